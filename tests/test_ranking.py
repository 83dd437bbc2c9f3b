"""Choosing between candidates with a language model: losses against whole forward passes, batches against samples
alone, videos, and what is refused.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_blip2_llm import ARCHITECTURES, build, pictures, rows
from torch import Tensor

CANDIDATES = ["yes", "no", "a red square", "on the table near the water", "two"]
OWN = [["red", "blue", "two dogs"], ["yes", "no"], CANDIDATES]
QUESTIONS = ["what color is the star?", "is it a dog?", "how many black dogs are there in the park near the water?"]
VICUNAS = ("blip2_vicuna", "blip2_vicuna_instruct")


@pytest.fixture(autouse=True)
def kept_generator() -> Iterator[None]:
    """Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def videos(count: int = 3, num_frames: int = 2) -> Tensor:
    return torch.stack([pictures(count * num_frames)[i::count] for i in range(count)]).transpose(1, 2)


def samples_of(kind: str = "image") -> dict[str, Any]:
    return {"image": pictures() if kind == "image" else videos(), "text_input": QUESTIONS}


@torch.no_grad()
def whole_pass(model: Any, sample: dict[str, Any], candidate: str) -> tuple[Tensor, int]:
    """Negative log-likelihood of one candidate behind one sample by transformers' model alone, and how many tokens the
    sample and the candidate have.
    """
    network, tokenizer = model.lm.model, model.llm_tokenizer.tokenizer
    (prompt,) = sample["text_input"]
    seen = model.image_embeds(sample, [prompt])
    read = torch.tensor(model.llm_tokenizer.inputs([prompt]))
    given = torch.cat([seen, network.get_input_embeddings()(read)], dim=1)
    if model.lm.is_encoder_decoder:
        text = tokenizer([candidate], return_tensors="pt").input_ids
        logits = network(inputs_embeds=given, labels=text).logits[0]
    else:
        written = candidate if model.llm_prefix == "llm" else f" {candidate}"
        text = tokenizer([written], add_special_tokens=False, return_tensors="pt").input_ids
        if not model.family.score_without_eos:
            text = torch.cat([text, torch.tensor([[model.lm.end_id]])], dim=1)
        whole = torch.cat([given, network.get_input_embeddings()(text)], dim=1)
        logits = network(inputs_embeds=whole).logits[0, given.shape[1] - 1 : -1]
    return F.cross_entropy(logits, text[0], reduction="sum"), given.shape[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_loss_is_that_of_a_whole_pass(arch: str) -> None:
    """Lists of unequal lengths, prompts of unequal lengths, one batch; images, and videos for one of the models."""
    model = build(arch)
    samples = samples_of("video" if arch == "blip2_vicuna_instruct" else "image")
    losses, undivided = (model.class_losses(samples, OWN, divided=divided) for divided in (True, False))
    assert losses.shape == (3, 5)
    for row, own in enumerate(OWN):
        assert (losses[row, len(own) :] == torch.inf).all()
        sums, lengths = zip(*(whole_pass(model, rows(samples, [row]), text) for text in own), strict=True)
        expected = torch.stack(sums)
        torch.testing.assert_close(undivided[row, : len(own)], expected, rtol=1e-5, atol=1e-5)
        if arch in VICUNAS:
            longest = max(len(ids) for ids in model.llm_tokenizer.tokenizer(own, add_special_tokens=False).input_ids)
            expected = expected / (lengths[0] + longest - 1)
        torch.testing.assert_close(losses[row, : len(own)], expected, rtol=1e-5, atol=1e-5)
    assert model.predict_class(samples, OWN) == [
        row[: len(own)].argsort().tolist() for row, own in zip(losses, OWN, strict=True)
    ]


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_an_answer_list_is_ranked_as_candidates_are(arch: str) -> None:
    model, samples = build(arch), samples_of()
    settings = {"inference_method": "rank", "answer_list": CANDIDATES}
    order, losses = model.rank_answers(samples, QUESTIONS, CANDIDATES, len(CANDIDATES))
    torch.testing.assert_close(losses, model.class_losses(samples, CANDIDATES, divided=False).gather(1, order))
    likeliest = [CANDIDATES[row[0]] for row in model.predict_class(samples, CANDIDATES).tolist()]
    assert model.predict_answers(samples, **settings) == likeliest


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_a_batch_ranks_as_its_members_do_alone(arch: str, kind: str) -> None:
    model, samples = build(arch), samples_of(kind)
    for candidates in (OWN, CANDIDATES, [CANDIDATES] * 3):
        losses = model.class_losses(samples, candidates)
        for row in range(3):
            own = candidates if candidates is CANDIDATES else [candidates[row]]
            alone = model.class_losses(rows(samples, [row]), own)[0]
            torch.testing.assert_close(losses[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)
        order = [2, 0, 1]
        again = candidates if candidates is CANDIDATES else [candidates[i] for i in order]
        torch.testing.assert_close(model.class_losses(rows(samples, order), again), losses[order], rtol=1e-5, atol=1e-5)
    ranks = model.predict_class(samples, CANDIDATES)
    assert ranks.tolist() == model.predict_class(samples, [CANDIDATES] * 3).tolist()
    assert len(set(map(tuple, model.class_losses(samples, CANDIDATES).tolist()))) == 3


@pytest.mark.parametrize("arch", ["blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_a_batch_of_videos_writes_what_its_members_write_alone(arch: str) -> None:
    model, samples = build(arch), samples_of("video")
    asked = {"image": samples["image"], "prompt": QUESTIONS}
    together = model.generate(asked, num_beams=3, max_length=8)
    assert model.generate(rows(asked, [2, 0, 1]), num_beams=3, max_length=8) == [together[i] for i in (2, 0, 1)]
    assert [model.generate(rows(asked, [i]), num_beams=3, max_length=8)[0] for i in range(3)] == together
    answers = model.predict_answers(samples, num_beams=3, max_len=6)
    assert [model.predict_answers(rows(samples, [i]), num_beams=3, max_len=6)[0] for i in range(3)] == answers


@pytest.mark.parametrize("arch", ["blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_images_and_prompts_are_read_once_and_memory_is_bounded(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples, read, steps = build(arch), samples_of(), [], []
    expected = model.class_losses(samples, OWN)
    encode, prefix, extend = model.encode_image, model.lm.prefix, model.lm.extend
    monkeypatch.setattr(model, "encode_image", lambda image: read.append(len(image)) or encode(image))
    monkeypatch.setattr(model.lm, "prefix", lambda *inputs: read.append(len(inputs[0])) or prefix(*inputs))
    monkeypatch.setattr(model.lm, "extend", lambda cache, ids: steps.append(tuple(ids.shape)) or extend(cache, ids))
    monkeypatch.setattr("lavis_lite.nn.llm.STEP_BYTES", 250_000)
    torch.testing.assert_close(model.class_losses(samples, OWN), expected)
    assert read == [3, 3]
    assert 2 < len(steps) < 10  # several at once, not all
    assert sum(count for count, _ in steps) <= sum(map(len, OWN))  # no row for a candidate that is not there
    assert [width for _, width in steps] == sorted((width for _, width in steps), reverse=True)


def test_segments_change_vicunas_divisor_alone() -> None:
    """Within a segment all losses have one divisor; of the same candidates with another model nothing changes."""
    samples = samples_of()
    model = build("blip2_t5_instruct")
    for candidates in (CANDIDATES, [CANDIDATES] * 3):
        whole, parts = (model.class_losses(samples, candidates, n_segments=n) for n in (1, 2))
        assert torch.equal(whole, parts)
    model = build("blip2_vicuna_instruct")
    ratio = model.class_losses(samples, [CANDIDATES] * 3, 2) / model.class_losses(samples, [CANDIDATES] * 3)
    counts = [len(row) for row in model.llm_tokenizer.continuations(CANDIDATES, end=False)]
    for row, question in enumerate(QUESTIONS):
        num_read = model.query_tokens.shape[1] + len(model.llm_tokenizer.inputs([question])[0]) - 1
        divisors = torch.tensor([max(counts[:2])] * 2 + [max(counts[2:])] * 3) + num_read
        torch.testing.assert_close(ratio[row], (max(counts) + num_read) / divisors)
    with pytest.raises(ValueError, match=r"n_segments: .* 2, got 3"):
        model.class_losses(samples, OWN, 3)


def test_text_input_in_prompts_of_candidates() -> None:
    """`text_input` alone without a prompt or in a prompt without a gap of the model's own; in the gap of another."""
    model, seen = build("blip2_vicuna_instruct", prompt="a photo of"), []
    asked = model.prompt_embeds
    model.prompt_embeds = lambda samples, prompts, **own: seen.append(prompts) or asked(samples, prompts, **own)
    image = pictures(1)
    model.class_losses({"image": image, "text_input": ["is it red?"]}, ["yes", "no"])
    model.class_losses({"image": image, "text_input": "red", "prompt": "is it {}?"}, ["yes", "no"])
    model.class_losses({"image": image, "text_input": [["red", "dog"]], "prompt": "is the {} {}?"}, ["yes", "no"])
    model.class_losses({"image": image}, ["yes", "no"])
    assert seen == [["is it red?"], ["is it red?"], ["is the red dog?"], ["a photo of"]]


# mistakes


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "candidates: an empty list"),
        ("yes", "candidates.*'yes'"),
        ([["yes"], [], ["no"]], "sample 1"),
        ([["yes"], "no", ["no"]], "sample 1.*'no'"),
        (["yes", " "], "1.*' '"),
        (["yes", ["no"]], r"1.*\['no'\]"),
        ([["yes"], ["no"], ["a", ""]], "1 of sample 2"),
        ([["yes"], ["no"]], "candidates: 2 lists .* 3 images"),
        (
            ["yes", "on the table near the water"],
            r"candidate 'on the table near the water' .*max_output_txt_len=6 ",
        ),
    ],
)
@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_bad_candidates(arch: str, candidates: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(arch, max_output_txt_len=6)
    monkeypatch.setattr(model, "image_embeds", lambda *_: pytest.fail("the images were read before"))
    with pytest.raises(ValueError, match=message):
        model.predict_class(samples_of(), candidates)


def test_the_longest_candidate_that_fits() -> None:
    text = "on the table near the water"
    for arch in ("blip2_vicuna_instruct", "blip2_t5_instruct"):
        limit = len(build(arch).llm_tokenizer.tokenizer([text]).input_ids[0])  # with its start or end token
        build(arch, max_output_txt_len=limit).class_losses(samples_of(), [text])
        with pytest.raises(ValueError, match=f"max_output_txt_len={limit - 1} "):
            build(arch, max_output_txt_len=limit - 1).class_losses(samples_of(), [text])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_input": QUESTIONS[:2]}, "2 .*3 "),
        ({"text_input": [[text] for text in QUESTIONS[:2]]}, "2 .*3 "),
        ({"prompt": ["{}"] * 2}, "prompt.*2 .*3 "),
        ({"context": ["a park"] * 4}, "context.*4 .*3 "),
        (
            {"image": [pictures(1)[0], videos(1)[0], pictures(1)[0]]},
            r"image.* one tensor, of images or videos of one size",
        ),
        ({"image": [pictures(1)[0], pictures(1)[0][:, :16]]}, r"image.* one tensor, of images or videos of one size"),
        ({"image": videos()[:, :, :0]}, r"image.*\(3, 3, 0, 32, 32\)"),
        ({"image": videos().transpose(1, 2)}, r"image.*\(3, 2, 3, 32, 32\)"),
        ({"image": "cat.jpg"}, "image.*str"),
        ({"text_input": ["is it red? " * 200] * 3}, "256"),
    ],
)
def test_bad_batches(changes: dict[str, Any], message: str) -> None:
    model = build("blip2_vicuna_instruct", max_txt_len=60)  # what the Q-Former reads is cut, not what is asked
    samples = samples_of() | changes
    with pytest.raises(ValueError, match=message):
        model.predict_class(samples, CANDIDATES)
    if "context" not in changes:
        prompt = samples.get("prompt", samples["text_input"])
        with pytest.raises(ValueError, match=message):
            model.generate({"image": samples["image"], "prompt": prompt})


def test_a_candidate_beyond_the_context() -> None:
    model = build("blip2_vicuna_instruct", max_output_txt_len=400)
    with pytest.raises(ValueError, match="256"):
        model.class_losses(samples_of(), ["yes", "a red square " * 80])


def test_ocr_tokens_of_another_number_of_images() -> None:
    model = build("blip2_vicuna_instruct")
    with pytest.raises(ValueError, match=r"ocr_tokens.*1 .*3 "):
        model.generate({"image": pictures(), "prompt": "read: {}", "ocr_tokens": [["a"]]})


# training on videos


@pytest.mark.parametrize("arch", ["blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_training_on_a_video_is_training_on_its_frames(arch: str) -> None:
    """Loss and gradients against frames that are seen one by one and joined by hand; without dropout."""
    model, video, answers = build(arch), videos(2, 3), ["red", "two black dogs"]
    model({"image": video, "text_input": QUESTIONS[:2], "text_output": answers})["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["query_tokens"].norm() > 0
    model.zero_grad()
    frames = [model.image_embeds({"image": video[:, :, i]}, QUESTIONS[:2]) for i in range(3)]
    batch = model.llm_tokenizer.answer_batch(QUESTIONS[:2], answers)
    model.lm.loss(*model.concat_embeds(torch.cat(frames, dim=1), batch.ids, batch.mask), batch.labels).backward()
    by_hand = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == by_hand.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-4, atol=1e-4 * float(gradient.abs().max()) + 1e-7)
