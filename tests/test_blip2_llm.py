"""BLIP-2 with a language model: batches, training texts, answers, what is frozen and saved, and what is refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_case import REFERENCE
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BartConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    T5Config,
)

from lavis_lite.common import checkpoint
from lavis_lite.common.registry import registry
from lavis_lite.models.blip2.families import ANY as ANY_FAMILY
from lavis_lite.models.blip2.families import OPT
from lavis_lite.models.blip2.llm_checks import llm_dtype
from lavis_lite.models.blip2.llm_tokenizer import LLMTokenizer
from lavis_lite.models.blip2.prompts import class_prompts, generation_prompts, question_prompts, split_caption
from lavis_lite.nn.decoding import Decoded

TINY = REFERENCE / "tiny_hf"
MODELS = {
    "blip2_opt": ("opt_model", "opt"),
    "blip2_t5": ("t5_model", "t5"),
    "blip2_vicuna": ("llm_model", "llama"),
    "blip2_llm": ("llm_model", "llama"),
    "blip2_vicuna_instruct": ("llm_model", "llama"),
    "blip2_t5_instruct": ("t5_model", "t5"),
}
ARCHITECTURES = sorted(MODELS)
SIZES: dict[str, Any] = {
    "vit_model": "eva_tiny",
    "vit_weights": "random",
    "image_size": 32,
    "vit": {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 16},
    "num_query_token": 3,
    "qformer": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "max_positions": 64},
    "tokenizer": str(TINY / "bert"),
}
QUESTIONS = ["what color is the star?", "how many black dogs are there in the park?", "who?"]


@pytest.fixture(autouse=True)
def kept_generator() -> Iterator[None]:
    """Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


def config_of(arch: str, **settings: Any) -> dict[str, Any]:
    key, folder = MODELS[arch]
    return {**SIZES, key: str(TINY / folder), **settings}


def build(arch: str, **settings: Any) -> Any:
    """A small model in evaluation mode; its random parts are moved, so that images and questions matter."""
    torch.manual_seed(5)
    model = registry.get_model_class(arch)(**config_of(arch, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.mul_(8)
    return model


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def rows(samples: dict[str, Any], index: list[int]) -> dict[str, Any]:
    """These samples of a batch."""
    return {
        key: value[torch.tensor(index)] if isinstance(value, Tensor) else [value[i] for i in index]
        for key, value in samples.items()
    }


# generation


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_batch_writes_what_its_members_write_alone(arch: str) -> None:
    model = build(arch)
    samples = {"image": pictures(), "prompt": ["a photo of", "", "Question: what is to the left of it? Answer:"]}
    settings = {"num_beams": 3, "max_length": 8, "repetition_penalty": 1.0}
    together = model.generate(samples, **settings)
    assert [model.generate(rows(samples, [i]), **settings)[0] for i in range(3)] == together
    assert model.generate(rows(samples, [2, 0, 1]), **settings) == [together[i] for i in (2, 0, 1)]
    assert len(set(together)) > 1
    asked = {"image": pictures(), "text_input": QUESTIONS}
    answers = model.predict_answers(asked, num_beams=3, max_len=5, prompt="Question: {} Answer:")
    again = model.predict_answers(rows(asked, [1, 2, 0]), num_beams=3, max_len=5, prompt="Question: {} Answer:")
    assert [again[i] for i in (2, 0, 1)] == answers


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5"])
def test_a_prompt_is_one_for_all_samples_or_one_per_sample(arch: str) -> None:
    model = build(arch)
    image, settings = pictures(2), {"num_beams": 2, "max_length": 6}
    one = model.generate({"image": image, "prompt": "a photo of"}, **settings)
    assert model.generate({"image": image, "prompt": ["a photo of"] * 2}, **settings) == one
    model.prompt = "a photo of"
    assert model.generate({"image": image}, **settings) == one
    several = model.generate({"image": image}, num_captions=2, **settings)
    assert len(several) == 4
    assert several[::2] == one
    drawn = model.generate({"image": image}, use_nucleus_sampling=True, num_captions=3, max_length=6)
    assert len(drawn) == 6


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5"])
def test_max_length_counts_the_start_token_of_a_causal_model(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build(arch), []
    generate = model.lm.generate
    monkeypatch.setattr(model.lm, "generate", lambda *args: seen.append(args[2]) or generate(*args))
    model.generate({"image": pictures(1)}, max_length=7, min_length=2, num_beams=1)
    model.predict_answers({"image": pictures(1), "text_input": "what?"}, max_len=7)
    start = int(model.lm.is_encoder_decoder)  # a causal model's max_length counts its start token
    assert [config.max_length for config in seen] == [7 + start, 8]
    assert (seen[0].min_length, seen[1].length_penalty, seen[1].num_beams) == (2, -1.0, 5)


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5"])
def test_messages_show_the_lengths_that_were_given(arch: str) -> None:
    """Not those that count the start token too."""
    model, samples = build(arch), {"image": pictures(1), "text_input": "what?"}
    with pytest.raises(ValueError, match=r"min_length 20 .*max_length 5"):
        model.generate(samples, max_length=5, min_length=20)
    with pytest.raises(ValueError, match=r"min_length 20 .*max_length 5"):
        model.predict_answers(samples, max_len=5, min_len=20)
    with pytest.raises(ValueError, match=r"^max_length: .* got 0"):
        model.predict_answers(samples, max_len=0, min_len=0)


# answers


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5", "blip2_llm"])
def test_ranking_is_the_likeliest_whole_answer(arch: str) -> None:
    model = build(arch)
    samples = {"image": pictures(2), "text_input": QUESTIONS[:2]}
    answers = ["yes", "no", "a red square", "on the table near the water", "two"]
    prompts = [f"Question: {question} Answer:" for question in QUESTIONS[:2]]
    losses = torch.zeros(2, len(answers))
    for column, answer in enumerate(answers):
        batch = model.llm_tokenizer.answer_batch(prompts, [answer] * 2)
        embeds, mask = model.concat_embeds(model.image_embeds(samples, prompts), batch.ids, batch.mask)
        logits = model.lm.logits(embeds, mask, batch.labels).log_softmax(-1)
        picked = logits.gather(2, batch.labels.clamp(min=0)[:, :, None])[:, :, 0]
        losses[:, column] = -(picked * (batch.labels != -100)).sum(1)
    order, ranked = model.rank_answers(samples, prompts, answers, 5)
    torch.testing.assert_close(ranked, losses.gather(1, order), rtol=1e-4, atol=1e-4)
    expected = [answers[i] for i in losses.argmin(1).tolist()]
    settings = {"inference_method": "rank", "answer_list": answers, "prompt": "Question: {} Answer:"}
    assert model.predict_answers(samples, **settings) == expected
    first = [model.llm_tokenizer.continuations([answer])[0][0] for answer in answers]
    prefix = model.lm.prefix(*model.prompt_embeds(samples, prompts))
    likeliest = [answers[int(row[first].argmax())] for row in prefix.logits]
    assert model.predict_answers(samples, num_ans_candidates=1, **settings) == likeliest


def test_a_start_token_that_all_answers_share_does_not_choose_between_them(tmp_path: Path) -> None:
    """BART's answers begin with `<s>`: the first token that counts is the second."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(**sizes, vocab_size=424, max_position_embeddings=64)
    folder = llm_folder(tmp_path / "llm", config, "llama")
    model = build("blip2_llm", llm_model=str(folder), llm_precision="fp32")
    assert len(model.llm_tokenizer.prefix_ids) == 1
    with torch.no_grad():
        for parameter in model.llm_model.parameters():
            parameter.normal_(std=0.5)
    samples, prompts, answers = {"image": pictures()}, ["what?"] * 3, ["yes", "no", "red", "blue", "two", "a"]
    order, _ = model.rank_answers(samples, prompts, answers, 1)
    ids = torch.tensor([row[:2] for row in model.llm_tokenizer.continuations(answers)])
    embeds, mask = model.prompt_embeds(samples, prompts)
    logits = model.lm.logits(embeds, mask, ids[:1].expand(3, -1))[:, 1]
    assert order[:, 0].tolist() == logits[:, ids[:, 1]].argmax(dim=1).tolist()
    assert order.any()


def test_the_question_replaces_the_placeholder_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build("blip2_opt"), []
    monkeypatch.setattr(model, "prompt_embeds", lambda samples, prompts, **_: seen.append(prompts) or [None, None])
    monkeypatch.setattr(model.lm, "generate", lambda *_: Decoded(torch.tensor([[2, 68], [2, 68]])))
    samples = {"image": pictures(2), "text_input": QUESTIONS[:2]}
    model.predict_answers(samples)
    model.predict_answers(samples, prompt="Question: {} Short answer:")
    model.prompt = "Q: {}"
    model.predict_answers(samples)
    assert seen[0] == QUESTIONS[:2]
    assert seen[1] == [f"Question: {question} Short answer:" for question in QUESTIONS[:2]]
    assert seen[2] == [f"Q: {question}" for question in QUESTIONS[:2]]


def test_prompt_forms() -> None:
    two = {"text_input": ["who?", "where?"], "choices": [["a", "b"], ["c"]]}
    assert question_prompts(two, "{} Options: {}.", 2) == ["who? Options: (a) a (b) b.", "where? Options: (a) c."]
    words = {"text_input": ["who?"], "ocr_tokens": [["x"] * 31]}
    assert question_prompts(words, "Read: {} {}", 1) == ["Read: " + ", ".join(["x"] * 30) + " who?"]
    assert generation_prompts({"ocr_tokens": [["a", "b"]]}, "Read: {}", 1) == ["Read: a, b"]
    assert generation_prompts({"text_input": "who?"}, "Q: {} A:", 2) == ["Q: who? A:"] * 2
    assert generation_prompts({"text_input": "unused"}, "a photo", 2) == ["a photo"] * 2
    sample = {"prompt": "{}?", "text_input": ["who"], "context": ["a park"], "history": ["hi"], "caption": "a dog"}
    assert class_prompts(sample, "", 1) == [
        'This image has the caption "a dog". dialog history: hi\ncontext: a park. who?'
    ]
    assert question_prompts(sample, "Q: {} A:", 1) == [class_prompts({**sample, "prompt": "Q: {} A:"}, "", 1)[0]]
    some = {"text_input": ["who?", "why?"], "history": ["", "hi"], "context": ["a park", ""], "caption": ""}
    assert class_prompts(some, "", 2) == ["context: a park. who?", "dialog history: hi\nwhy?"]
    assert question_prompts({"text_input": ["a {} {b}"]}, "Q: {}", 1) == ["Q: a {} {b}"]
    assert generation_prompts(words, "Read: {}. Q: {}", 1) == ["Read: " + ", ".join(["x"] * 30) + ". Q: who?"]
    assert generation_prompts(words, "Read: {}", 1) == ["Read: " + ", ".join(["x"] * 30)]
    with pytest.raises(ValueError, match=r"ocr_tokens.*choices"):
        question_prompts({"text_input": ["who?"]}, "{} {}", 1)


def test_placeholders_without_a_text_and_texts_in_place_of_lists() -> None:
    with pytest.raises(ValueError, match=r"'Read: \{\}. Q: \{\}' .*2 .*1 "):
        generation_prompts({"ocr_tokens": [["a"]]}, "Read: {}. Q: {}", 1)
    with pytest.raises(ValueError, match=r"'Q: \{\} Options: \{\}' .*2 .*1 "):
        class_prompts({"prompt": "Q: {} Options: {}", "text_input": ["who?"]}, "", 1)
    for key in ("ocr_tokens", "choices"):
        with pytest.raises(ValueError, match="'word'"):
            question_prompts({"text_input": ["who?"], key: ["word"]}, "{} {}", 1)


def test_the_lemmatizer_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("blip2_opt", apply_lemmatizer=True)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r"apply_lemmatizer.*spacy"):
        model.predict_answers({"image": pictures(1), "text_input": ["who?"]}, max_len=2)


@pytest.mark.parametrize("arch", ["blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_classes_of_each_image_are_those_of_one_list(arch: str) -> None:
    model = build(arch)
    samples = {"image": pictures(2), "prompt": "is it {}?", "text_input": ["red", "a dog"]}
    candidates = ["yes", "no", "a red square"]
    ranks = model.predict_class(samples, candidates)
    assert model.predict_class(samples, [candidates] * 2).tolist() == ranks.tolist()
    assert [sorted(row) for row in ranks.tolist()] == [[0, 1, 2]] * 2
    ragged = model.predict_class(samples, [candidates, candidates[:2]])
    assert ragged[0] == ranks[0].tolist()
    assert sorted(ragged[1]) == [0, 1]
    with pytest.raises(ValueError, match=r"n_segments: .* 3, got 4"):
        model.predict_class(samples, candidates, n_segments=4)


def test_a_video_is_seen_frame_after_frame() -> None:
    model = build("blip2_opt")
    frames = pictures(2)
    video = frames.transpose(0, 1)[None]
    seen = model.image_embeds({"image": video}, [""])
    expected = torch.cat([model.image_embeds({"image": frame[None]}, [""]) for frame in frames], dim=1)
    torch.testing.assert_close(seen, expected)
    assert len(model.generate({"image": video}, max_length=4, num_beams=2)) == 1


# training


def test_a_frozen_image_encoder_stays_in_evaluation_mode() -> None:
    """Without drop path, two training passes see the same tokens; an encoder that is trained drops paths."""
    for freeze_vit in (True, False):
        vit = {**SIZES["vit"], "depth": 4}
        model = build("blip2_opt", drop_path_rate=0.9, freeze_vit=freeze_vit, vit=vit).train()
        first, second = (model.encode_image(pictures(8)) for _ in range(2))
        assert torch.equal(first, second) == freeze_vit
        assert model.visual_encoder.training != freeze_vit


def test_captions_are_split_uniformly_up_to_half() -> None:
    words = [f"w{i}" for i in range(7)]
    cuts = []
    for _ in range(300):
        beginning, rest = split_caption(" ".join(words))
        assert f"{beginning} {rest}".split() == words
        cuts.append(len(beginning.split()))
    assert {cut: cuts.count(cut) > 60 for cut in set(cuts)} == {1: True, 2: True, 3: True}
    assert split_caption("word") == ("", "word")
    assert split_caption("two words") == ("two", "words")


@pytest.mark.parametrize("arch", ["blip2_t5", "blip2_opt"])
def test_a_prompt_begins_the_caption_and_is_not_learned(arch: str) -> None:
    model = build(arch, prompt="a photo of")
    tokens, coder = model.llm_tokenizer.tokenizer, model.llm_tokenizer
    for caption in ("a red square", "a photo of a red square"):
        batch = model.llm_tokenizer.caption_batch([caption], model.prompt)
        learned = batch.labels[0][batch.labels[0] != -100]
        assert tokens.decode(learned[:-1]).strip() == "a red square"
        assert learned[-1] == coder.end_id
        read = batch.ids[0].tolist()
        prompt = coder.inputs(["a photo of"])[0]
        assert read[: len(prompt)] == prompt
        assert (len(read) > len(prompt)) != model.lm.is_encoder_decoder


def test_long_texts_are_cut_where_they_should_be() -> None:
    """max_txt_len cuts a caption with its end token, and an instruction at its beginning."""
    model = build("blip2_opt", max_txt_len=6)
    (row,) = model.llm_tokenizer.caption_batch(["a red square above a blue circle"], model.prompt).ids.tolist()
    assert row == [2, *model.llm_tokenizer.outputs(["a red square above a blue circle"])[0][:5]]
    assert model.lm.end_id not in row
    model = build("blip2_vicuna_instruct", max_txt_len=6, max_output_txt_len=4)
    question = model.llm_tokenizer.inputs(["what color is the star?"])[0]
    batch = model.llm_tokenizer.answer_batch(["what color is the star?"], ["a black cat sitting on the table"])
    assert batch.ids[0, :6].tolist() == [2, *question[-5:]]
    assert (batch.labels[0] != -100).sum() == 3


def test_a_prompt_that_leaves_no_room_for_the_caption() -> None:
    model = build("blip2_opt", prompt="a photo of", max_txt_len=8)
    with pytest.raises(ValueError, match=r"model\.prompt: 'a photo of' .*max_txt_len=8"):
        model({"image": pictures(1), "text_input": ["a photo of a cat"]})


def test_a_byte_level_vocabulary_gets_the_space_before_an_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "opt")
    coder = LLMTokenizer(tokenizer, OPT, is_encoder_decoder=False, max_length=8, max_output_length=8)
    joint = tokenizer("the star is red\n").input_ids
    assert coder.inputs(["the star is"])[0] + coder.continuations(["red"])[0] == joint
    sentencepiece = AutoTokenizer.from_pretrained(TINY / "llama")
    coder = LLMTokenizer(sentencepiece, ANY_FAMILY, is_encoder_decoder=False, max_length=8, max_output_length=8)
    joint = sentencepiece("the star is red").input_ids
    assert coder.inputs(["the star is"])[0] + coder.continuations(["red"], end=False)[0] == joint


def test_the_qformer_reads_the_question_with_qformer_text_input() -> None:
    for reads in (True, False):
        model = build("blip2_opt", qformer_text_input=reads)
        samples = {"image": pictures(2)}
        first, second = (
            model.image_embeds(samples, ["who?", "who?"]),
            model.image_embeds(samples, ["who?", "where is the cat?"]),
        )
        torch.testing.assert_close(first[0], second[0])
        assert torch.allclose(first[1], second[1]) != reads
        model({**samples, "text_input": QUESTIONS[:2], "text_output": ["red", "two"]})["loss"].backward()
        read = any(".intermediate.dense" in name and p.grad is not None for name, p in model.named_parameters())
        assert read == reads


def test_a_caption_that_is_learned_is_not_shown_to_the_qformer(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch in ("blip2_vicuna_instruct", "blip2_t5_instruct"):
        model, shown = build(arch, prompt="a photo of"), []
        embed = model.image_embeds
        monkeypatch.setattr(
            model,
            "image_embeds",
            lambda samples, texts, embed=embed, shown=shown: shown.append(texts) or embed(samples, texts),
        )
        model({"image": pictures(2), "text_input": ["a cat", "a dog"]})
        assert shown == [["a photo of"] * 2]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["caption", "answer"])
def test_a_training_step_leaves_the_frozen_parts_alone(arch: str, form: str) -> None:
    model = build(arch).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.optimizer_groups(0.05), lr=1e-3)
    samples = {"image": pictures(2), "text_input": ["a red square above a circle", "a black cat"]}
    samples |= {"text_output": ["red", "two dogs"]} if form == "answer" else {}
    loss = model(samples)["loss"]
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"visual_encoder", f"{model.llm_prefix}_model"}
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"query_tokens", f"{model.llm_prefix}_proj.weight", "ln_vision.weight"} <= changed
    assert not changed & frozen


def test_checkpoints_leave_out_a_language_model_that_can_be_fetched(tmp_path: Path) -> None:
    kept = build("blip2_opt").checkpoint_state_dict()
    assert not any(name.startswith("opt_model.") for name in kept)
    assert {"opt_proj.weight", "query_tokens"} <= kept.keys()
    random = build("blip2_opt", opt_model="tiny_opt").checkpoint_state_dict()
    assert any(name.startswith("opt_model.") for name in random)
    model = build("blip2_opt")
    checkpoint.save({"model": model.checkpoint_state_dict()}, tmp_path / "saved.pth")
    again = same_encoder(config_of("blip2_opt", checkpoint=str(tmp_path / "saved.pth")), "blip2_opt", model)
    samples = {"image": pictures(2), "text_input": ["a cat", "a dog"]}
    torch.testing.assert_close(again(samples)["loss"], model(samples)["loss"])


def test_stage_two_starts_from_stage_one(tmp_path: Path) -> None:
    """Its file has no projection, which may be new in a pretrained model, but not in a finetuned one."""
    model = build("blip2_opt")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("opt_")}
    checkpoint.save({"model": state}, tmp_path / "stage1.pth")
    cls = type(model)
    loaded = cls.from_config(config_of("blip2_opt", pretrained=str(tmp_path / "stage1.pth")))
    assert torch.equal(loaded.query_tokens, model.query_tokens)
    with pytest.raises(ValueError, match="opt_proj"):
        cls.from_config(config_of("blip2_opt", finetuned=str(tmp_path / "stage1.pth")))


def test_a_language_model_can_be_trained_whole() -> None:
    model = build("blip2_opt", freeze_llm=False).train()
    model({"image": pictures(2), "text_input": ["a cat", "a dog"]})["loss"].backward()
    assert model.opt_model.lm_head.weight.grad.norm() > 0
    assert any(name.startswith("opt_model.") for name in model.checkpoint_state_dict())


# any language model


def llm_folder(folder: Path, config: PreTrainedConfig, tokenizer: str) -> Path:
    """A folder with this config, a tiny tokenizer and no weights."""
    shutil.copytree(TINY / tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config.save_pretrained(folder)
    return folder


SMALL = {"vocab_size": 424, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 64}
ANY = {
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=2), "llama"),
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=2, bos_token_id=None, eos_token_id=2), "opt"),
    "gemma3": (Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, sliding_window=4), "llama"),
    "gpt2": (GPT2Config(vocab_size=424, n_embd=32, n_layer=2, n_head=4, n_positions=64), "opt"),
    "opt": (OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16), "opt"),
    "t5": (T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                    decoder_start_token_id=0), "t5"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ANY))
def test_any_language_model(name: str, tmp_path: Path) -> None:
    model = build("blip2_llm", llm_model=str(llm_folder(tmp_path / "llm", *ANY[name])), llm_precision="fp32")
    samples = {"image": pictures(2), "text_input": ["a red square", "the black cat is"], "text_output": ["on", "off"]}
    for batch in (samples, {key: samples[key] for key in ("image", "text_input")}):
        model.zero_grad()
        model(batch)["loss"].backward()
        assert model.query_tokens.grad.norm() > 0
    assert model.llm_proj.out_features == model.lm.width
    asked = {"image": pictures(2), "text_input": QUESTIONS[:2]}
    generated = model.predict_answers(asked, max_len=4)
    assert [model.predict_answers(rows(asked, [i]), max_len=4)[0] for i in range(2)] == generated
    ranked = model.predict_answers(asked, inference_method="rank", answer_list=["yes", "no"])
    assert set(ranked) <= {"yes", "no"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_lora_is_what_is_trained_and_saved(arch: str, tmp_path: Path) -> None:
    model = build(arch, llm_lora={"r": 2})
    prefix = f"{model.llm_prefix}_model."
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith(prefix)}
    assert trained
    assert all("lora_" in name for name in trained)
    saved = model.checkpoint_state_dict()
    assert {name for name in saved if name.startswith(prefix)} == trained
    checkpoint.save({"model": saved}, tmp_path / "lora.pth")
    again = same_encoder(config_of(arch, llm_lora={"r": 2}, checkpoint=str(tmp_path / "lora.pth")), arch, model)
    samples = {"image": pictures(2), "text_input": QUESTIONS[:2], "text_output": ["red", "two dogs"]}
    loss = model(samples)["loss"]
    torch.testing.assert_close(again(samples)["loss"], loss, rtol=1e-4, atol=0)  # Vicuna's padding token is random
    loss.backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for name, p in model.named_parameters() if name in trained)


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_vicuna_instruct", "blip2_t5_instruct"])
def test_lora_starts_from_a_file_that_holds_the_language_model(arch: str, tmp_path: Path) -> None:
    """As it does where the language model is a random one; the adapters are zero at first."""
    language = {MODELS[arch][0]: {"opt": "tiny_opt", "llama": "tiny_vicuna", "t5": "tiny_t5"}[MODELS[arch][1]]}
    base = build(arch, **language)
    checkpoint.save({"model": base.checkpoint_state_dict()}, tmp_path / "base.pth")
    settings = config_of(arch, **language, llm_lora={"r": 2}, pretrained=str(tmp_path / "base.pth"))
    samples = {"image": pictures(2), "text_input": QUESTIONS[:2], "text_output": ["red", "two dogs"]}
    torch.testing.assert_close(same_encoder(settings, arch, base)(samples)["loss"], base(samples)["loss"])


def same_encoder(settings: dict[str, Any], arch: str, model: Any) -> Any:
    """A model of these settings with the random image encoder, which has no source, of another."""
    again = registry.get_model_class(arch).from_config(settings).eval()
    again.visual_encoder.load_state_dict(model.visual_encoder.state_dict())
    return again


# mistakes


@pytest.fixture
def loading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be found before a language model is built or loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr("lavis_lite.nn.llm_loading._build", refuse)


@pytest.mark.usefixtures("loading_is_refused")
class TestRefusedBeforeLoading:
    def from_config(self, arch: str, **settings: Any) -> None:
        registry.get_model_class(arch).from_config(config_of(arch, **settings))

    def saved(self, tmp_path: Path, **changes: Tensor) -> str:
        checkpoint.save({"model": {"query_tokens": torch.zeros(1, 3, 32), **changes}}, tmp_path / "other.pth")
        return str(tmp_path / "other.pth")

    @pytest.mark.parametrize("kind", ["checkpoint", "finetuned", "pretrained"])
    def test_a_checkpoint_of_a_wider_language_model(self, kind: str, tmp_path: Path) -> None:
        source = self.saved(tmp_path, **{"opt_proj.weight": torch.zeros(2560, 32)})
        with pytest.raises(ValueError, match=r"2560, .*opt has 32: .*model\.opt_model"):
            self.from_config("blip2_opt", **{kind: source})

    @pytest.mark.parametrize("kind", ["checkpoint", "finetuned", "pretrained"])
    def test_a_checkpoint_of_another_vocabulary(self, kind: str, tmp_path: Path) -> None:
        source = self.saved(tmp_path, **{"opt_model.lm_head.weight": torch.zeros(500, 32)})
        with pytest.raises(ValueError, match=r"500 .*opt_model\.lm_head\.weight.* 380"):
            self.from_config("blip2_opt", **{kind: source})

    def test_a_language_model_of_another_family(self) -> None:
        with pytest.raises(ValueError, match=r"model\.opt_model: .*t5 .*blip2_llm"):
            self.from_config("blip2_opt", opt_model=str(TINY / "t5"))

    def test_no_language_model(self) -> None:
        with pytest.raises(ValueError, match=r"model\.llm_model"):
            registry.get_model_class("blip2_llm").from_config(SIZES)

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no_such"):
            self.from_config("blip2_opt", opt_model=str(tmp_path / "no_such"))

    def test_a_missing_tokenizer(self, tmp_path: Path) -> None:
        shutil.copy(TINY / "opt" / "config.json", tmp_path)
        with pytest.raises(FileNotFoundError, match="tokenizer"):
            self.from_config("blip2_opt", opt_model=str(tmp_path))

    def test_fp16_on_the_cpu(self) -> None:
        with pytest.raises(ValueError, match=r"llm_precision.*fp16"):
            self.from_config("blip2_opt", llm_precision="fp16")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"llm_precision": "fp8"}, "llm_precision: .*'fp8'"),
            ({"llm_precision": "bf16", "freeze_llm": False}, "llm_precision"),
            ({"llm_quantization": "int3"}, "llm_quantization: .*'int3'"),
            ({"llm": {"hidden": 3}}, "hidden"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.from_config("blip2_opt", **settings)


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5"])
def test_bad_samples(arch: str) -> None:
    model, image = build(arch), pictures(2)
    with pytest.raises(ValueError, match=r"\['image'\]"):
        model.generate({"prompt": "a photo of"})
    with pytest.raises(ValueError, match=r"\['image'\].*\(3, 32, 32\)"):
        model.generate({"image": image[0]})
    with pytest.raises(ValueError, match=r"(?=.*\['prompt'\])(?=.*3)(?=.*2)"):
        model.generate({"image": image, "prompt": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"(?=.*\['text_input'\])(?=.*1)(?=.*2)"):
        model({"image": image, "text_input": ["a"]})
    with pytest.raises(ValueError, match=r"\['text_input'\]"):
        model({"image": image})
    with pytest.raises(ValueError, match=r"\['text_input'\]"):
        model.predict_answers({"image": image})
    with pytest.raises(ValueError, match="answer_list"):
        model.predict_answers({"image": image, "text_input": QUESTIONS[:2]}, inference_method="rank")
    with pytest.raises(ValueError, match=r"inference_method.*guess"):
        model.predict_answers({"image": image, "text_input": QUESTIONS[:2]}, inference_method="guess")
    asked = {"image": image, "text_input": QUESTIONS[:2]}
    with pytest.raises(ValueError, match=r"answer_list.*'red'"):
        model.predict_answers(asked, inference_method="rank", answer_list="red")
    with pytest.raises(ValueError, match=r"1\b.*answer_list.*''|answer_list\[1\].*''"):
        model.predict_answers(asked, inference_method="rank", answer_list=["red", ""])
    with pytest.raises(ValueError, match=r"num_ans_candidates\b.*0"):
        model.predict_answers(asked, inference_method="rank", answer_list=["red"], num_ans_candidates=0)
    for prompt in (None, 3):
        with pytest.raises(ValueError, match=rf"\['prompt'\].*{prompt}"):
            model.generate({"image": image, "prompt": prompt})


def test_a_prompt_longer_than_the_context() -> None:
    limit = json.loads((TINY / "opt" / "config.json").read_text())["max_position_embeddings"]
    model = build("blip2_opt")
    with pytest.raises(ValueError, match=f"{limit}"):
        model.generate({"image": pictures(1), "prompt": "a photo of a red square and " * 40})


def test_cut_prompts_equal_the_tokenizers_truncation() -> None:
    """The first `max_txt_len` tokens, `</s>` included, in `generate` and `predict_answers`; without the setting all."""
    prompts = ["Question: what is to the left of the big red square and the small blue circle? Answer:", "a photo of"]
    samples = {"image": pictures(2), "text_input": prompts}
    for cut in (True, False):
        model = build("blip2_opt", max_txt_len=9, cut_prompts=cut)
        tokens = model.llm_tokenizer.tokenizer(
            prompts,
            truncation=cut,
            max_length=9 if cut else None,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        assert (tokens.input_ids.shape[1] == 9) == cut
        read = []
        generate = model.lm.generate
        model.lm.generate = lambda *args: read.append(args[:2]) or generate(*args)  # noqa: B023
        model.generate({"image": samples["image"], "prompt": prompts}, max_length=4)
        model.predict_answers(samples, max_len=3)
        num_queries = model.query_tokens.shape[1]
        for embeds, mask in read:
            assert torch.equal(embeds[:, num_queries:], model.lm.embed(tokens.input_ids))
            assert torch.equal(mask[:, num_queries:], tokens.attention_mask)
        assert len(read) == 2


def test_cut_prompts_do_not_cut_what_candidates_are_scored_with() -> None:
    """LAVIS's OPT cut prompts where it wrote, and had no scoring of candidates."""
    asked = {"image": pictures(1), "prompt": "Question: what is to the left of the big red square? Answer:"}
    whole, cut = (build("blip2_opt", max_txt_len=9, cut_prompts=cut) for cut in (False, True))
    cut.load_state_dict(whole.state_dict())
    candidates = ["a red circle", "two"]
    assert torch.equal(cut.class_losses(asked, candidates), whole.class_losses(asked, candidates))


def test_precisions() -> None:
    """auto is bf16 but for tiny models, whose config says float32."""
    config = build("blip2_opt").opt_model.config
    assert config.dtype == torch.float32
    assert llm_dtype("auto", config, frozen=True) == torch.float32
    config.word_embed_proj_dim = config.hidden_size = 2048
    assert llm_dtype("auto", config, frozen=True) == torch.bfloat16
    assert llm_dtype("auto", config, frozen=False) == torch.float32
    model = build("blip2_opt", llm_precision="bf16")
    assert {parameter.dtype for parameter in model.opt_model.parameters()} == {torch.bfloat16}
    loss = model({"image": pictures(2), "text_input": ["a cat", "a dog"]})["loss"]
    loss.backward()
    assert loss.dtype == model.query_tokens.grad.dtype == torch.float32
