"""Files as LAVIS writes them into every BLIP architecture; and what answers do not depend on: batch, order, cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
from torch import Tensor

from lavis_lite.common import checkpoint
from lavis_lite.common.config import zoo
from lavis_lite.models import load_model, load_model_and_preprocess
from lavis_lite.nn.decoding import GenerationConfig, decode
from lavis_lite.nn.losses import draw_negatives
from lavis_lite.nn.momentum import enqueue

ARCHITECTURES = sorted(name for name in zoo.model_zoo.names() if name.startswith("blip_"))
MOMENTUM = {"blip_pretrain", "blip_retrieval"}
REQUIRED = {"blip_classification": {"num_classes": 3}}


@pytest.fixture(autouse=True)
def kept_generator() -> Iterator[None]:
    """Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def pictures(count: int, *, size: int = 48, seed: int = 3) -> Tensor:
    """Random images (count,3,size,size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(arch: str, **changes: Any) -> Any:
    """A tiny model of an architecture with seeded weights."""
    return cli_helpers.build(arch, **REQUIRED.get(arch, {}), **changes)


def shaken(arch: str, **changes: Any) -> Any:
    """The same with other weights: every parameter moved, momentum twins away from their originals."""
    model = build(arch, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lavis_file(model: Any, path: Path) -> dict[str, Tensor]:
    """A `.pth` as LAVIS's runner saves it: no frozen parameter, so no momentum twin; returns its weights."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in frozen}
    saved = {"model": state, "optimizer": {"state": {}, "param_groups": []}, "config": {"run": {}}, "scaler": None}
    torch.save({**saved, "epoch": 4}, path)
    return state


@pytest.mark.parametrize("how", ["checkpoint", "finetuned", "pretrained"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.slow
def test_a_lavis_file_loads(arch: str, how: str, tmp_path: Path) -> None:
    """The file is of 64-pixel images and of a queue twice as long."""
    longer = {"embed_dim": 16, "queue_size": 32} if arch in MOMENTUM else {}
    source = shaken(arch, image_size=64, **longer)
    state = lavis_file(source, tmp_path / "lavis.pth")
    assert not any("_m." in name and not name.endswith("position_ids") for name in state)
    shorter = {**longer, "queue_size": 16} if longer else {}
    model = build(arch, **shorter, **{how: str(tmp_path / "lavis.pth")})
    loaded = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("_queue"):
            assert loaded[name].shape[-1] == 16
        elif name == "visual_encoder.pos_embed":
            assert tensor.shape[1] == 17
            torch.testing.assert_close(loaded[name], resized(tensor))
        else:
            assert torch.equal(loaded[name], tensor), name
    pairs = model.momentum_pairs() if hasattr(model, "momentum_pairs") else []
    assert len(pairs) == {"blip_pretrain": 4, "blip_retrieval": 4, "blip_classification": 3}.get(arch, 0)
    for online, momentum_encoder in pairs:
        cli_helpers.assert_same_state(dict(online.state_dict()), dict(momentum_encoder.state_dict()))
        assert not any(p.requires_grad for p in momentum_encoder.parameters())


def resized(pos_embed: Tensor) -> Tensor:
    """4 x 4 position embeddings on a grid of 3 x 3, point by point: bicubic with a = -0.75, edges repeated."""

    def weight(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    rows = torch.zeros(3, 4)
    for new in range(3):
        centre = (new + 0.5) * 4 / 3 - 0.5
        for old in range(-2, 7):
            rows[new, min(max(old, 0), 3)] += weight(centre - old)
    grid = pos_embed[0, 1:].reshape(4, 4, -1)
    new_grid = torch.einsum("ai,bj,ije->abe", rows, rows, grid).reshape(1, 9, -1)
    return torch.cat([pos_embed[:, :1], new_grid], dim=1)


def test_packaged_type_with_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = load_model("blip_retrieval", "tiny")
    state = lavis_file(source, tmp_path / "lavis.pth")
    torch.manual_seed(6)
    model, vis, text = load_model_and_preprocess(
        "blip_retrieval", "tiny", is_eval=True, checkpoint=tmp_path / "lavis.pth"
    )
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    cli_helpers.assert_same_state(*(dict(part.state_dict()) for part in model.momentum_pairs()[0]))
    assert text["eval"]("A Red circle!") == "a red circle"
    assert set(vis) == {"train", "eval"}


@pytest.mark.parametrize("arch", sorted(MOMENTUM))
def test_own_checkpoint_keeps_the_momentum_encoders(arch: str, tmp_path: Path) -> None:
    """The runner saves the momentum encoders, which are not copies of the online weights."""
    model = shaken(arch, embed_dim=16, queue_size=16)
    torch.save({"model": model.checkpoint_state_dict()}, tmp_path / "own.pth")
    again = build(arch, embed_dim=16, queue_size=16, checkpoint=str(tmp_path / "own.pth"))
    cli_helpers.assert_same_state(dict(again.state_dict()), dict(model.state_dict()))
    assert not torch.equal(again.vision_proj_m.weight, again.vision_proj.weight)


def test_nlvr_from_pretraining_starts_both_streams_alike(tmp_path: Path) -> None:
    pretrained = shaken("blip_pretrain", embed_dim=16, queue_size=16)
    lavis_file(pretrained, tmp_path / "pretrain.pth")
    model = build("blip_nlvr", pretrained=str(tmp_path / "pretrain.pth"), med={"merge_streams_from": 1})
    for mine, theirs in zip(model.text_encoder.encoder.layer, pretrained.text_encoder.encoder.layer, strict=True):
        cross, source = mine.crossattention, theirs.crossattention
        for stream in (cross.self0, cross.self1):
            cli_helpers.assert_same_state(dict(stream.state_dict()), dict(source.self.state_dict()))
        for dense in (cross.output.dense0, cross.output.dense1):
            cli_helpers.assert_same_state(dict(dense.state_dict()), dict(source.output.dense.state_dict()))
        assert torch.equal(cross.output.LayerNorm.weight, source.output.LayerNorm.weight)
    assert model.text_encoder.encoder.layer[1].crossattention.output.merge_layer is not None
    with pytest.raises(ValueError, match=r"lacks .* trainable keys .*cls_head"):
        build("blip_nlvr", finetuned=str(tmp_path / "pretrain.pth"))


def test_classification_from_captioning_starts_as_its_decoder(tmp_path: Path) -> None:
    caption = shaken("blip_caption")
    lavis_file(caption, tmp_path / "caption.pth")
    model = build("blip_classification", pretrained=str(tmp_path / "caption.pth"))
    cli_helpers.assert_same_state(dict(model.text_encoder.state_dict()), dict(caption.text_decoder.bert.state_dict()))
    cli_helpers.assert_same_state(dict(model.visual_encoder.state_dict()), dict(caption.visual_encoder.state_dict()))
    cli_helpers.assert_same_state(dict(model.text_encoder_m.state_dict()), dict(model.text_encoder.state_dict()))


@pytest.mark.parametrize(("arch", "other"), [("blip_vqa", "blip_caption"), ("blip_caption", "blip_retrieval")])
def test_another_architecture_is_refused(arch: str, other: str, tmp_path: Path) -> None:
    lavis_file(build(other), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth lacks \d+ trainable keys of the model"):
        build(arch, checkpoint=str(tmp_path / "other.pth"))
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"linear\.pth"):
        build(arch, checkpoint=str(tmp_path / "linear.pth"))


def test_another_size_is_refused(tmp_path: Path) -> None:
    wide = build("blip_caption", med={"intermediate_size": 48})
    lavis_file(wide, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"wide\.pth: .* shapes differ from the model's: .*\(48, 32\)"):
        build("blip_caption", checkpoint=str(tmp_path / "wide.pth"))


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match="blip_caption"):
        load_model("blip_captoin", "tiny")
    with pytest.raises(KeyError, match="base_coco"):
        load_model("blip_caption", "base_cocoo")


# Answers


@pytest.fixture(scope="module")
def captioner() -> Any:
    """A captioner whose captions differ from image to image."""
    model = build("blip_caption").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0 if "crossattention" in name else 2.5)
    return model


SETTINGS = [
    {"num_beams": 3, "max_length": 14, "min_length": 8},
    {"num_beams": 1, "max_length": 12, "min_length": 1, "repetition_penalty": 1.5},
    {"num_beams": 4, "max_length": 12, "num_captions": 2, "length_penalty": -1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["beams", "greedy", "several"])
def test_captions_do_not_depend_on_the_batch(captioner: Any, settings: dict[str, Any]) -> None:
    images, count = pictures(5), settings.get("num_captions", 1)
    prompts = ["a picture of ", "", "a red circle is ", "a picture of ", "there is a small "]
    together = captioner.generate({"image": images, "prompt": prompts}, **settings)
    assert len(together) == 5 * count
    assert len(set(together)) > count
    alone = [
        c for i in range(5) for c in captioner.generate({"image": images[i : i + 1], "prompt": prompts[i]}, **settings)
    ]
    assert together == alone
    order = [3, 0, 4, 2, 1]
    shuffled = captioner.generate({"image": images[order], "prompt": [prompts[i] for i in order]}, **settings)
    assert shuffled == [c for i in order for c in together[i * count : (i + 1) * count]]


def questioner(**settings: Any) -> Any:
    """A question answerer whose answers depend on every token of the question, were it padding."""
    model = shaken("blip_vqa", **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "text_decoder" in name and "crossattention" in name and parameter.ndim > 1:
                parameter.mul_(6)
    return model


QUESTIONS = ["is it", "what color is the big star to the left of the red circle", "is there a blue square", "who?"]


@pytest.mark.parametrize("method", ["rank", "generate"])
def test_answers_do_not_depend_on_the_batch(method: str) -> None:
    model, images = questioner(), pictures(4)
    settings = {"inference_method": method, "answer_list": ["red", "yes", "no", "two circles"], "num_ans_candidates": 3}
    samples = {"image": images, "text_input": QUESTIONS}
    together = model.predict_answers(samples, **settings)
    alone = [
        model.predict_answers({"image": images[i : i + 1], "text_input": [q]}, **settings)[0]
        for i, q in enumerate(QUESTIONS)
    ]
    assert together == alone


@pytest.mark.parametrize("memory", [1, 40_000, 4 << 30])
def test_ranked_answers_have_the_loss_of_a_whole_pass_over_each(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one to nine words, an empty one too, one or a few at once; fp32, to 1e-5."""
    answers = ["yes", "", "two circles", "the big red star to the left of it", "no", "a red circle", "blue", "is it"]
    model, samples = questioner(), {"image": pictures(4), "text_input": QUESTIONS}
    monkeypatch.setattr("lavis_lite.models.blip.vqa.STEP_BYTES", memory)
    with torch.no_grad():
        order, losses = model.rank_answers(samples, QUESTIONS, answers, 6)
        states, mask = model.encode_questions(samples)
        for row in range(4):
            context = model.text_decoder.bert.project_kv(states[row : row + 1], mask=mask[row : row + 1])
            for answer, loss in zip(order[row].tolist(), losses[row], strict=True):
                ids, _ = model.tokenize([answers[answer]], start=model.decoder_start)
                expected = model.answer_loss(ids, context)[0]
                torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_decoder_may_see_the_questions_padding() -> None:
    """As LAVIS's `generate` and transformers' does, which gives its decoder a mask of ones."""
    model, samples = questioner(decoder_sees_padding=True), {"image": pictures(4), "text_input": QUESTIONS}
    written = model.predict_answers(samples, inference_method="generate", num_beams=1, max_len=6)
    assert written != questioner().predict_answers(samples, inference_method="generate", num_beams=1, max_len=6)
    with torch.no_grad():
        states, mask = model.encode_questions(samples)
    assert 0 < mask.sum() < mask.numel()
    ids = hugging_face(model).generate(
        input_ids=torch.full((4, 1), model.decoder_start),
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones_like(mask),
        do_sample=False,
        max_length=6,
        eos_token_id=model.tokenizer.sep_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    assert written == model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_nucleus_sampling_is_seeded_and_varied(captioner: Any) -> None:
    settings = {"use_nucleus_sampling": True, "num_captions": 4, "max_length": 12, "min_length": 6, "top_p": 0.95}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(captioner.generate({"image": pictures(2)}, **settings))
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 8
    assert len(set(runs[0])) > 2
    torch.manual_seed(0)
    certain = captioner.generate({"image": pictures(2)}, **{**settings, "top_p": 1e-6, "num_captions": 1})
    greedy = captioner.generate({"image": pictures(2)}, num_beams=1, max_length=12, min_length=6)
    assert certain == greedy  # the smallest nucleus holds the likeliest token only


@pytest.mark.parametrize("prompt", ["a picture of ", "Is it red? Yes, a ", "a ünïcode (círcle): ", "", "  "])
def test_captions_leave_the_prompt_out(captioner: Any, prompt: str) -> None:
    """However the tokenizer spells the prompt: the caption is what the tokens behind the prompt's read."""
    captions = captioner.generate({"image": pictures(3), "prompt": prompt}, num_beams=1, max_length=24, min_length=1)
    ids, _ = captioner.tokenize([prompt] * 3, start=captioner.decoder_start)
    context = captioner.text_decoder.bert.project_kv(captioner.visual_encoder(pictures(3)))
    settings = captioner.decoding(GenerationConfig(max_length=24, min_length=1, num_beams=1))
    whole = decode(captioner.step(context), ids[:, :-1], settings)
    words = [captioner.tokenizer.decode(row, skip_special_tokens=True) for row in whole.ids[:, ids.shape[1] - 1 :]]
    assert [c.replace(" ", "").replace("##", "") for c in captions] == [
        w.replace(" ", "").replace("##", "") for w in words
    ]


def test_several_captions_need_beams(captioner: Any) -> None:
    with pytest.raises(ValueError, match="num_beams"):
        captioner.generate({"image": pictures(1)}, num_beams=2, num_captions=3)
    with pytest.raises(ValueError, match=r"samples\[.*\]: 2 .* 1 "):
        captioner.generate({"image": pictures(1), "prompt": ["a", "b"]})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1, "max_length": 14},
        {"num_beams": 1, "max_length": 14, "min_length": 9, "repetition_penalty": 1.3},
        {"num_beams": 3, "max_length": 14, "min_length": 9},
        {"num_beams": 3, "max_length": 16, "repetition_penalty": 1.6, "length_penalty": 0.0},
        {"num_beams": 5, "max_length": 12, "min_length": 6, "repetition_penalty": 0.8, "length_penalty": 2.0},
    ],
    ids=["greedy", "greedy_penalty", "beam", "beam_penalty", "beam_reward"],
)
@torch.no_grad()
def test_decoding_as_transformers_does(captioner: Any, settings: dict[str, Any]) -> None:
    """Since 4.27 transformers' length penalty leaves the prompt out of the length, and ours counts it, as the published
    results did; so it is 0 where that decides."""
    twin, images = hugging_face(captioner), pictures(6)
    prompt = captioner.tokenize(["a picture of "] * 6, start=captioner.decoder_start)[0][:, :-1]
    states = captioner.visual_encoder(images)
    end = {"eos_token_id": captioner.tokenizer.sep_token_id, "pad_token_id": captioner.tokenizer.pad_token_id}
    theirs = twin.generate(input_ids=prompt, encoder_hidden_states=states, do_sample=False, **end, **settings)
    step = captioner.step(captioner.text_decoder.bert.project_kv(states))
    ours = decode(step, prompt, captioner.decoding(GenerationConfig(**settings))).ids
    assert ours.tolist() == theirs.tolist()
    assert len({tuple(row) for row in ours.tolist()}) > 2


def hugging_face(model: Any) -> Any:
    """transformers' text decoder with the model's weights."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    sizes = model.text_decoder.bert.config
    config = BlipTextConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        encoder_hidden_size=sizes.context_width,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=sizes.max_positions,
        bos_token_id=model.decoder_start,
        sep_token_id=model.tokenizer.sep_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
        is_decoder=True,
    )
    twin = BlipTextLMHeadModel(config).eval()
    missing, unexpected = twin.load_state_dict(model.text_decoder.state_dict(), strict=False)
    assert set(unexpected) <= {"bert.embeddings.position_ids"}
    assert not missing
    return twin


# Training bricks


def test_negatives_are_negatives() -> None:
    """Weights that all but force the positive, or vanish for the negatives: a negative is drawn where there is one."""
    torch.manual_seed(0)
    positive = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    weights = torch.tensor([[1.0, 1e-30, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 1e-8], [0.7, 0.1, 0.1, 0.1]])
    drawn = torch.stack([draw_negatives(weights, positive) for _ in range(300)])
    assert not positive[:3].gather(1, drawn.t()[:3]).any()
    assert set(drawn[:, 0].tolist()) == {1}
    assert set(drawn[:, 1].tolist()) == {3}
    assert set(drawn[:, 2].tolist()) == {3}
    assert set(drawn[:, 3].tolist()) <= {0, 1, 2, 3}  # no negative at all: anything, but no error


def test_negatives_are_drawn_by_weight() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).expand(6000, 4)
    positive = torch.tensor([[True, False, False, False]]).expand(6000, 4)
    share = draw_negatives(weights, positive).bincount(minlength=4) / 6000
    torch.testing.assert_close(share, torch.tensor([0.0, 1 / 6, 3 / 6, 2 / 6]), rtol=0, atol=0.03)


def test_queue_wraps_around_at_any_pointer() -> None:
    """A queue loaded from a run with another batch size may have a pointer that is no multiple of this one's."""
    queue, ids, pointer = torch.zeros(2, 8), torch.full((1, 8), -100), torch.tensor([6])
    enqueue([(queue, torch.ones(2, 4)), (ids, torch.arange(4)[None])], pointer)
    assert ids[0].tolist() == [2, 3, -100, -100, -100, -100, 0, 1]
    assert queue[0].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert pointer.tolist() == [2]


def test_checkpoint_of_a_tied_model_has_no_surplus(tmp_path: Path) -> None:
    """Shared tensors of blip_pretrain are one on disk, so that the file is not bigger than the model."""
    model = build("blip_pretrain", embed_dim=16, queue_size=16)
    path = checkpoint.save({"model": model.checkpoint_state_dict()}, tmp_path / "model.pth")
    unique = {p.data_ptr(): p.nbytes for p in [*model.parameters(), *model.buffers()]}
    assert path.stat().st_size < sum(unique.values()) * 1.3 + 200_000


def test_a_checkpoint_with_foreign_parts_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A VQA file has all that captioning needs and more: fine to start from, suspicious as the model to evaluate."""
    lavis_file(shaken("blip_vqa"), tmp_path / "vqa.pth")
    build("blip_caption", pretrained=str(tmp_path / "vqa.pth"))
    assert "make sure" not in caplog.text
    build("blip_caption", checkpoint=str(tmp_path / "vqa.pth"))
    assert "text_encoder" in caplog.text
    assert "make sure" in caplog.text


class Gallery:
    """Batches of two images, as a retrieval loader yields them."""

    def __init__(self, image: Tensor, text: list[str]) -> None:
        self.image, self.text, self.dataset = image, text, self

    def __len__(self) -> int:
        return len(self.image)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"image": self.image[part], "index": part} for part in torch.arange(len(self)).split(2))


def test_retrieval_by_contrast_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are the cosines of the features, also under autocast, where rounded ones would be tied."""
    model = build("blip_retrieval", embed_dim=16, queue_size=0).eval()
    image, texts = pictures(5), ["a red circle", "a blue star", "yes"]
    monkeypatch.setattr(model, "matching_logits", None)  # the head is not called
    with torch.no_grad():
        features = model.image_features(image)[1], model.encode_text(*model.tokenize(texts, max_length=35))
        expected = features[0] @ features[1].t()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model.compute_sim_matrix(Gallery(image, texts), k_test=0)[0]
    i2t, t2i = model.compute_sim_matrix(Gallery(image, texts), k_test=0)
    torch.testing.assert_close(torch.as_tensor(i2t), expected)
    torch.testing.assert_close(torch.as_tensor(t2i), expected.t())
    assert not torch.equal(torch.as_tensor(rough), torch.as_tensor(rough).bfloat16().float())


@pytest.mark.parametrize("arch", ["blip_caption", "blip_vqa", "blip2"])
def test_texts_that_the_positions_do_not_hold_are_refused_before_one_is_begun(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny models have 64 positions; the last token of a text is written and never read."""
    model = build(arch).eval() if arch != "blip2" else load_model("blip2", "tiny", qformer={"max_positions": 64}).eval()
    samples = {"image": pictures(2), "text_input": ["what is it", "where"]}

    def written(longest: int, shortest: int) -> list[str]:
        if arch == "blip_vqa":
            return model.predict_answers(
                samples, inference_method="generate", num_beams=2, max_len=longest, min_len=shortest
            )
        return model.generate({"image": samples["image"]}, num_beams=2, max_length=longest, min_length=shortest)

    assert len(written(65, 65)) == 2
    module = {"blip_caption": "captions", "blip_vqa": "blip.vqa", "blip2": "captions"}[arch]
    monkeypatch.setattr(f"lavis_lite.models.{module}.decode", lambda *_: pytest.fail("a text was begun"))
    with pytest.raises(ValueError, match=r"max_length: .* at most 65, got 66"):
        written(66, 1)
