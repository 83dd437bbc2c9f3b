"""The shapes of what LAVIS's models return beside their losses, as its own tests ask for them, with random weights."""

from typing import Any

import cli_helpers
import pytest
import torch

from lavis_lite.models import load_model

IMAGES, TOKENS, WIDTH = 2, 10, 32  # 48 pixels in patches of 16, and the class token
TEXTS = ["a large statue of a person spraying water from a fountain", "the merlion"]


def run(name: str, **samples: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = cli_helpers.build(name, image_size=48).eval()
    given = {"image": torch.randn(IMAGES, 3, 48, 48), "text_input": TEXTS, **samples}
    return model, model(given)


STEP = {"epoch": 0, "iters": 0, "num_iters_per_epoch": 10}


def test_captioning() -> None:
    image = torch.randn(IMAGES, 3, 48, 48)
    model, output = run("caption", image=image, text_input=["a picture of a dog", "a picture of two large dogs"])
    parts = output.intermediate_output
    assert parts.image_embeds.shape == (IMAGES, TOKENS, WIDTH)
    num_tokens = model.tokenize(["a picture of two large dogs"])[0].shape[1]
    assert parts.decoder_labels.shape == (IMAGES, num_tokens)
    assert parts.decoder_output.logits.shape[:2] == (IMAGES, num_tokens)
    torch.testing.assert_close(parts.image_embeds, model.visual_encoder(image))


@pytest.mark.parametrize("name", ["retrieval", "pretrain"])
def test_contrast_and_matching(name: str) -> None:
    model, output = run(name, image_id=torch.arange(IMAGES), **STEP)
    num_candidates = IMAGES + model.image_queue.shape[1]
    for key in ("sim_i2t", "sim_t2i", "sim_i2t_m", "sim_t2i_m", "sim_i2t_targets", "sim_t2i_targets"):
        assert output.sims[key].shape == (IMAGES, num_candidates)
    torch.testing.assert_close(output.sims.sim_i2t_targets.sum(dim=1), torch.ones(IMAGES))
    parts = output.intermediate_output
    for key in ("image_embeds", "image_embeds_m"):
        assert parts[key].shape == (IMAGES, TOKENS, WIDTH)
    for key in ("text_embeds", "text_embeds_m"):
        assert parts[key].shape[::2] == (IMAGES, WIDTH)
    assert parts.itm_logits.shape == (3 * IMAGES, 2)
    assert parts.itm_labels.tolist() == [1] * IMAGES + [0] * 2 * IMAGES
    loss = torch.nn.functional.cross_entropy(parts.itm_logits.float(), parts.itm_labels)
    torch.testing.assert_close(output.loss_itm, loss.detach())
    assert ("decoder_labels" in parts) == (name == "pretrain")


def test_the_loss_of_the_contrast_is_that_of_the_similarities() -> None:
    _, output = run("retrieval", image_id=torch.arange(IMAGES), **STEP)
    losses = [
        -(output.sims[f"sim_{way}"].log_softmax(dim=1) * output.sims[f"sim_{way}_targets"]).sum(dim=1).mean()
        for way in ("i2t", "t2i")
    ]
    torch.testing.assert_close(output.loss_itc, sum(losses).detach() / 2)


def test_answers() -> None:
    samples = {"answer": ["a dog", "no", "yes"], "weight": torch.ones(3), "n_answers": torch.tensor([1, 2])}
    _, output = run("vqa_rank", **samples)
    parts = output.intermediate_output
    assert parts.image_embeds.shape == (IMAGES, TOKENS, WIDTH)
    assert parts.encoder_output.last_hidden_state.shape[::2] == (IMAGES, WIDTH)
    assert parts.decoder_output.logits.shape[:2] == parts.decoder_labels.shape
    assert len(parts.decoder_labels) == 3


def test_classes() -> None:
    label = torch.tensor([0, 1])
    _, output = run("classification", label=label, **STEP)
    assert output.intermediate_output.image_embeds.shape == (IMAGES, TOKENS, WIDTH)
    assert output.intermediate_output.encoder_output.last_hidden_state.shape[::2] == (IMAGES, WIDTH)
    images = {key: torch.randn(IMAGES, 3, 48, 48) for key in ("image0", "image1")}
    _, output = run("nlvr", label=label, **images)
    assert output.intermediate_output.image_embeds.shape == (2, IMAGES, TOKENS, WIDTH)
    assert output.logits.shape == (IMAGES, 2)


@pytest.mark.parametrize("arch", ["blip_feature_extractor", "blip2_feature_extractor", "blip2"])
def test_features(arch: str) -> None:
    model = load_model(arch, "tiny", is_eval=True)
    samples = {"image": torch.randn(1, 3, 48, 48), "text_input": ["a dog"]}
    both, image, text = (model.extract_features(samples, mode=mode) for mode in ("multimodal", "image", "text"))
    num_tokens = model.tokenize(["a dog"])[0].shape[1]
    num_states = num_tokens if arch.startswith("blip_") else model.query_tokens.shape[1]
    num_images = model.visual_encoder.pos_embed.shape[1] if arch.startswith("blip_") else num_states
    assert both.multimodal_embeds.shape[:2] == (1, num_states)
    assert image.image_embeds.shape[:2] == image.image_embeds_proj.shape[:2] == (1, num_images)
    assert text.text_embeds.shape[:2] == text.text_embeds_proj.shape[:2] == (1, num_tokens)
    assert image.image_embeds_proj.shape[2] == text.text_embeds_proj.shape[2]


@pytest.mark.parametrize("arch", ["blip_image_text_matching", "blip2_image_text_matching"])
def test_matching(arch: str) -> None:
    model = load_model(arch, "tiny", is_eval=True)
    samples = {"image": torch.randn(1, 3, 48, 48), "text_input": ["a dog"]}
    assert model(samples, match_head="itm").shape == (1, 2)
    assert model(samples, match_head="itc").shape == (1, 1)


def test_they_are_computed_only_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = run("retrieval", image_id=torch.arange(IMAGES), **STEP)
    calls: list[int] = []
    monkeypatch.setattr(model.text_encoder_m, "forward", lambda *_, **__: calls.append(1) or (torch.zeros(2, 3, 32),))
    assert not calls
    assert output.intermediate_output is output.intermediate_output
    assert calls == [1]
    assert "intermediate_output" not in output
    with pytest.raises(AttributeError, match="the output has no 'losses'; it has loss, loss_itc"):
        _ = output.losses
