"""BLIP-2's first stage: its three losses against hand-written loops, generation, heads, features and re-ranking.

The recorded outputs of the original are compared in test_reference.py.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.models import reranking
from lavis_lite.models.batches import in_compute_type
from lavis_lite.models.reranking import whole_rows
from lavis_lite.nn.losses import best_query_similarity, contrastive_loss, negative_weights

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
SIZES = {
    "vit_model": "eva_tiny",
    "vit_weights": "random",
    "image_size": 16,
    "vit": {"patch_size": 8, "width": 8, "depth": 1, "num_heads": 2},
    "num_query_token": 3,
    "qformer": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 12, "initializer_range": 0.3},
    "embed_dim": 6,
    "max_txt_len": 9,
    "tokenizer": str(REFERENCE / "tiny_hf" / "bert"),
}
TEXTS = ["a red square above a blue circle", "no", "the black cat is sitting"]


def build(arch: str = "blip2", **settings: Any) -> Any:
    """A tiny model with wild weights, so that queries and images differ."""
    torch.manual_seed(3)
    model = registry.get_model_class(arch)(**{**SIZES, **settings}).eval()
    with torch.no_grad():
        for parameter in [*model.visual_encoder.parameters(), *model.vision_proj.parameters()]:
            parameter.normal_(std=0.5)
    return model


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Any:
    return build()


def losses_by_hand(model: Any, image: Tensor, texts: list[str], ids: list[int], drawn: Any) -> dict[str, float]:
    """The three losses sample by sample (BLIP-2, section 3.2; label smoothing 0.1), each pair in a pass of its own."""
    count = len(texts)
    tokens = [model.tokenize([text], max_length=model.max_txt_len) for text in texts]
    context = [model.Qformer.project_kv(model.encode_image(image[i : i + 1])) for i in range(count)]
    queries = [F.normalize(model.vision_proj(model.query_states(c)), dim=-1)[0] for c in context]
    words = [F.normalize(model.text_proj(model.Qformer(None, *t)[0][0, 0]), dim=-1) for t in tokens]
    sims = [[max(float(q @ words[j]) for q in queries[i]) for j in range(count)] for i in range(count)]
    itc = 0.0
    for rows in (sims, [list(column) for column in zip(*sims, strict=True)]):
        for i in range(count):
            log_probs = (torch.tensor(rows[i]) / float(model.temp)).log_softmax(0)
            same = [float(ids[i] == ids[j]) for j in range(count)]
            targets = [0.9 * s / sum(same) + 0.1 / count for s in same]
            itc -= sum(t * float(p) for t, p in zip(targets, log_probs, strict=True)) / count / 2
    itm = 0.0
    pairs = [*((i, i, 1) for i in range(count)), *((int(drawn[0][i]), i, 0) for i in range(count))]
    for i, j, label in [*pairs, *((i, int(drawn[1][i]), 0) for i in range(count))]:
        states = model.Qformer(model.query_tokens, *tokens[j], context=context[i])[0][0, : len(queries[i])]
        logits = sum(model.itm_head(state) for state in states) / len(states)
        itm -= float(logits.log_softmax(0)[label]) / (3 * count)
    lm, num_words = 0.0, 0
    for i, (row, mask) in enumerate(tokens):
        row = torch.cat([torch.tensor([[model.tokenizer.bos_token_id]]), row[:, 1:]], dim=1)
        states, _ = model.Qformer(model.query_tokens, row, mask, context=context[i], causal=True)
        log_probs = model.Qformer.logits(states)[0, len(queries[i]) :].log_softmax(-1)
        for position in range(row.shape[1] - 1):
            lm -= float(0.9 * log_probs[position, row[0, position + 1]] + 0.1 * log_probs[position].mean())
            num_words += 1
    return {"loss_itc": itc, "loss_itm": itm, "loss_lm": lm / num_words}


@torch.no_grad()
@pytest.mark.parametrize("image_id", [None, [7, 8, 7]])
def test_losses_equal_hand_written_ones(
    model: Any, image_id: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = model.draw_negatives, []
    monkeypatch.setattr(model, "draw_negatives", lambda *logits: drawn.append(draw(*logits)) or drawn[0])
    samples = {"image": images(), "text_input": TEXTS}
    output = model(samples if image_id is None else {**samples, "image_id": image_id})
    expected = losses_by_hand(model, images(), TEXTS, image_id or [0, 1, 2], drawn[0])
    for name, value in expected.items():
        assert float(output[name]) == pytest.approx(value, rel=1e-5), name
    assert float(output.loss) == pytest.approx(sum(expected.values()), rel=1e-5)
    for negatives in drawn[0]:
        assert all((image_id or [0, 1, 2])[int(j)] != (image_id or [0, 1, 2])[i] for i, j in enumerate(negatives))


def test_best_query_and_negatives_by_hand() -> None:
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [-1.0, 0.0]]])
    texts = torch.tensor([[2.0, 1.0], [0.0, 3.0], [-1.0, 0.0]])
    assert best_query_similarity(queries, texts).tolist() == [[2.0, 3.0, 0.0], [1.5, 1.5, 1.0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert best_query_similarity(queries, texts).dtype == torch.float32
    logits = torch.tensor([[900.0, 0.0, 1.0986123]])  # a positive beside which the others would vanish
    torch.testing.assert_close(
        negative_weights(logits, torch.tensor([[True, False, False]])), torch.tensor([[0.0, 0.25, 0.75]])
    )


@pytest.mark.parametrize("settings", [{}, {"num_query_token": 1}, {"freeze_vit": False, "gather_with_grad": True}])
@pytest.mark.parametrize("count", [1, 3])
def test_trains_every_trainable_parameter(settings: dict[str, Any], count: int) -> None:
    model = build(**settings).train()
    samples = {"image": images(count), "text_input": TEXTS[:count]}
    loss = model(samples)["loss"]
    assert torch.isfinite(loss)
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert without == frozen
    assert all(name.startswith("visual_encoder.") for name in frozen)
    assert bool(frozen) == settings.get("freeze_vit", True)


def test_gather_with_grad_is_the_whole_gradient() -> None:
    """Without the switch, what is compared with counts as given."""
    samples = {"image": images(), "text_input": TEXTS}
    for switch in (True, False):
        model = build(gather_with_grad=switch)
        queries = model.image_features(samples["image"])[1].detach().requires_grad_()
        words = model.encode_text(*model.tokenize(TEXTS)).detach().requires_grad_()
        i2t, t2i = model.contrast(queries, words)
        actual = torch.autograd.grad(contrastive_loss(i2t, t2i, torch.eye(3)), (queries, words))
        fixed = [x if switch else x.detach() for x in (queries, words)]
        i2t = torch.stack([(queries @ word).amax(1) for word in fixed[1]], dim=1) / 0.07
        t2i = torch.stack([(fixed[0] @ word).amax(1) for word in words]) / 0.07
        losses = [F.cross_entropy(x, torch.arange(3), label_smoothing=0.1) for x in (i2t, t2i)]
        torch.testing.assert_close(actual, torch.autograd.grad(sum(losses) / 2, (queries, words)))


def test_equal_ids_leave_no_negative_but_a_loss(model: Any) -> None:
    with torch.no_grad():
        output = model({"image": images(), "text_input": TEXTS, "image_id": torch.tensor([4, 4, 4])})
    assert all(torch.isfinite(value) for value in output.values())


def test_images_are_encoded_and_projected_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for owner, name in ((model.visual_encoder, "forward"), (model.Qformer, "project_kv")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    with torch.no_grad():
        model({"image": images(), "text_input": TEXTS})
    assert calls == ["forward", "project_kv"]


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 1}, {"num_beams": 3, "num_captions": 2}])
def test_generates_the_same_alone_and_together(model: Any, kwargs: dict[str, int]) -> None:
    kwargs = {"min_length": 2, "max_length": 12, **kwargs}
    image = images()
    together = model.generate({"image": image}, **kwargs)
    alone = [model.generate({"image": image[i : i + 1]}, **kwargs) for i in range(3)]
    turned = model.generate({"image": image.flip(0)}, **kwargs)
    num = kwargs.get("num_captions", 1)
    assert together == [text for texts in alone for text in texts]
    assert together == [text for i in (2, 1, 0) for text in turned[i * num : (i + 1) * num]]
    assert len(set(together)) > 1


def test_greedy_equals_passes_without_cache(model: Any) -> None:
    """Each next token from one causal pass over queries and the text so far."""
    image = images(1, seed=5)
    context = model.image_context(image)
    ids = [model.tokenizer.bos_token_id]
    while len(ids) < 8:
        row = torch.tensor([ids])
        states, _ = model.Qformer(model.query_tokens, row, torch.ones_like(row), context=context, causal=True)
        logits = model.Qformer.logits(states[0, -1])
        logits[model.tokenizer.sep_token_id] = -torch.inf  # below min_length
        ids.append(int(logits.argmax()))
    expected = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert model.generate({"image": image}, num_beams=1, min_length=8, max_length=8) == [expected]


def test_repetition_penalty_counts(model: Any) -> None:
    settings = {"num_beams": 1, "min_length": 12, "max_length": 12}
    prefix = model.caption_context(images(4, seed=2))
    start = torch.full((4, 1), model.decoder_start)

    def repeats(**more: float) -> int:
        from lavis_lite.nn.decoding import GenerationConfig, decode

        rows = decode(model.step(prefix), start, model.decoding(GenerationConfig(**settings, **more))).ids.tolist()
        return sum(len(row) - len(set(row)) for row in rows)

    assert repeats(repetition_penalty=1e6) < repeats()
    captions = [model.generate({"image": images(4, seed=2)}, **settings, repetition_penalty=p) for p in (1.0, 1e6)]
    assert captions[0] != captions[1]


def test_prompts_begin_captions_and_are_left_out(model: Any) -> None:
    image, kwargs = images(), {"num_beams": 2, "min_length": 1, "max_length": 14}
    prompts = ["a red", "", "the black cat"]
    mixed = model.generate({"image": image, "prompt": prompts}, **kwargs)
    alone = [model.generate({"image": image[i : i + 1], "prompt": p}, **kwargs)[0] for i, p in enumerate(prompts)]
    assert mixed == alone
    assert mixed != model.generate({"image": image}, **kwargs)
    assert not any(text.startswith(p) for text, p in zip(mixed, prompts, strict=True) if p)


def test_nucleus_sampling_follows_the_seed(model: Any) -> None:
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return model.generate({"image": images(2)}, use_nucleus_sampling=True, num_captions=3, temperature=2.0)

    assert len(sample(0)) == 6
    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@torch.no_grad()
def test_heads_of_batches_equal_single_pairs() -> None:
    model = build("blip2_image_text_matching")
    samples = {"image": images(), "text_input": TEXTS}
    itm, itc = model(samples), model(samples, match_head="itc")
    assert (itm.shape, itc.shape) == ((3, 2), (3, 3))
    for i in range(3):
        image = images()[i : i + 1]
        torch.testing.assert_close(model({"image": image, "text_input": TEXTS[i]}), itm[i : i + 1])
        for j in range(3):
            one = model({"image": image, "text_input": TEXTS[j]}, match_head="itc")
            torch.testing.assert_close(one, itc[i : i + 1, j : j + 1])
    many = model({"image": images(1), "text_input": TEXTS}, match_head="itc")
    torch.testing.assert_close(many, itc[:1])
    assert itm[:, 1].std() > 0.01


@torch.no_grad()
def test_features_are_those_of_the_losses(model: Any) -> None:
    extractor = build("blip2_feature_extractor")
    samples = {"image": images(), "text_input": TEXTS}
    image, text, both = (extractor.extract_features(samples, mode=m) for m in ("image", "text", "multimodal"))
    assert image.image_embeds.shape == both.multimodal_embeds.shape == (3, 3, 16)
    assert image.image_embeds_proj.shape == (3, 3, 6)
    assert text.text_embeds.shape[:2] == text.text_embeds_proj.shape[:2] == (3, 9)
    torch.testing.assert_close(image.image_embeds_proj.norm(dim=-1), torch.ones(3, 3))
    sims = best_query_similarity(image.image_embeds_proj, text.text_embeds_proj[:, 0])
    matcher = build("blip2_image_text_matching")
    torch.testing.assert_close(sims, matcher(samples, match_head="itc"))
    torch.testing.assert_close(matcher.itm_head(both.multimodal_embeds).mean(1), matcher(samples))
    assert extractor(samples).keys() == both.keys()
    assert extractor.extract_features({"text_input": "no"}, mode="text").text_embeds.shape[0] == 1
    torch.testing.assert_close(model.extract_features(samples, mode="image")["image_embeds"], image.image_embeds)


class Gallery:
    """Batches of two images in another order than the set's, as a retrieval loader yields them."""

    def __init__(self, image: Tensor, text: list[str]) -> None:
        self.image, self.text, self.dataset = image, text, self

    def __len__(self) -> int:
        return len(self.image)

    def __iter__(self) -> Any:
        order = torch.tensor([2, 0, 3, 1])
        return ({"image": self.image[part], "index": part} for part in order.split(2))


GALLERY_TEXTS = [*TEXTS, "a green star", "how many dogs are there? two", "yes"]


@torch.no_grad()
def score_by_hand(image: Tensor, text: str) -> tuple[float, float]:
    """Similarity and match logit of one pair."""
    matcher = build("blip2_image_text_matching")
    samples = {"image": image[None], "text_input": text}
    return float(matcher(samples, match_head="itc")), float(matcher(samples)[0, 1])


def test_reranked_scores_by_hand(model: Any) -> None:
    image = images(4)
    i2t, t2i = model.compute_sim_matrix(Gallery(image, GALLERY_TEXTS), k_test=2)
    scores = [[score_by_hand(one, text) for text in GALLERY_TEXTS] for one in image]
    sims = torch.tensor([[sim for sim, _ in row] for row in scores])
    whole = torch.tensor([[sim + match for sim, match in row] for row in scores])
    for actual, sim, total in ((i2t, sims, whole), (t2i, sims.t(), whole.t())):
        expected = torch.full_like(total, -100.0)
        best = sim.topk(2, dim=1).indices
        expected.scatter_(1, best, total.gather(1, best))
        torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=1e-4, atol=1e-5)
    everything, _ = model.compute_sim_matrix(Gallery(image, GALLERY_TEXTS), k_test=1000)
    torch.testing.assert_close(torch.as_tensor(everything), whole, rtol=1e-4, atol=1e-5)


def test_texts_of_like_length_are_reranked_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, match, widths = Gallery(images(4), GALLERY_TEXTS), model.matching_logits, []
    expected = model.compute_sim_matrix(gallery, k_test=1000)

    def recorded(ids: Any, mask: Any, context: Any) -> Any:
        widths.append(ids.shape[1])
        return match(ids, mask, context)

    monkeypatch.setattr(model, "matching_logits", recorded)
    monkeypatch.setattr(reranking, "TEXTS_PER_STEP_OF_CPU", 2)
    for own, other in zip(model.compute_sim_matrix(gallery, k_test=1000), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)
    lengths = sorted(min(len(row), model.max_txt_len) for row in model.tokenizer(GALLERY_TEXTS).input_ids)
    longest = [max(lengths[start : start + 2]) for start in range(0, len(lengths), 2)]
    assert widths == longest * 4
    assert len(set(longest)) > 1


def test_contrast_alone_is_the_similarity(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = images(4)
    sims = torch.tensor([[score_by_hand(one, text)[0] for text in GALLERY_TEXTS] for one in image])
    monkeypatch.setattr(model, "matching_logits", None)  # the head is not called
    i2t, t2i = model.compute_sim_matrix(Gallery(image, GALLERY_TEXTS), k_test=0)
    torch.testing.assert_close(torch.as_tensor(i2t), sims, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(t2i), sims.t(), rtol=1e-4, atol=1e-5)


def test_match_logits_are_averaged_in_float32_under_autocast() -> None:
    """Rounded to bf16, scores of different texts are often equal, and retrieval ranks them by chance."""
    matcher = build("blip2_image_text_matching")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert matcher({"image": images(), "text_input": TEXTS}).dtype == torch.float32


def test_images_wait_for_reranking_in_half_the_bytes() -> None:
    """Under autocast the tokens are kept in the type that keys and values are computed in, which changes no score."""
    tokens = torch.randn(2, 3, 4)
    assert in_compute_type(tokens) is tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_compute_type(tokens).dtype == torch.bfloat16
        layer = torch.nn.Linear(4, 5)
        assert torch.equal(layer(in_compute_type(tokens)), layer(tokens))
    assert torch.equal(whole_rows(tokens[:, 0], torch.tensor([1, 0]), 2), tokens[:, 0].flip(0))


def test_clear_errors(model: Any) -> None:
    matcher = build("blip2_image_text_matching")
    with pytest.raises(ValueError, match=r"samples\['image'\]"):
        model.extract_features({}, mode="image")
    with pytest.raises(ValueError, match=r"samples\['image'\]"):
        model.generate({"prompt": "a"})
    with pytest.raises(ValueError, match=r"samples\['text_input'\]"):
        matcher({"image": images()})
    with pytest.raises(ValueError, match=r"mode: .*'video'"):
        model.extract_features({"image": images()}, mode="video")
    with pytest.raises(ValueError, match=r"match_head: .*'both'"):
        matcher({"image": images(), "text_input": TEXTS}, match_head="both")
    with pytest.raises(ValueError, match=r"samples\['text_input'\]: 2 .* 3 "):
        model({"image": images(), "text_input": TEXTS[:2]})
    with pytest.raises(ValueError, match=r"k_test: .* -1"):
        model.compute_sim_matrix(Gallery(images(4), GALLERY_TEXTS), k_test=-1)


def test_a_frozen_image_encoder_stays_in_evaluation_mode() -> None:
    """In training two passes of a frozen encoder are the same, drop path or not; those of a trained one differ."""
    deep = {"patch_size": 8, "width": 8, "depth": 6, "num_heads": 2}
    for frozen in (True, False):
        model = build(vit=deep, drop_path_rate=0.5, freeze_vit=frozen, num_query_token=1).train()
        assert model.Qformer.training
        torch.manual_seed(0)
        first, second = model.encode_image(images()), model.encode_image(images())
        assert torch.equal(first, second) == frozen
        assert torch.equal(first, model.eval().encode_image(images())) == frozen
