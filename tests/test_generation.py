"""Settings of generation, and decoding against enumeration of all texts and against transformers."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blip2_llm import build, pictures
from torch import Tensor

from lavis_lite.common.errors import InputError, InputTypeError
from lavis_lite.common.registry import registry
from lavis_lite.nn.attention import KeyValueCache
from lavis_lite.nn.decoding import Decoded, DecodingConfig, GenerationConfig, decode

END, PAD, START, WORDS = 0, 4, 3, (1, 2, 3)
BLIP = GenerationConfig(num_beams=3, max_length=30, min_length=10)


class RandomText:
    """Log-probabilities of the next token that depend on the whole text before it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def logits(self, text: tuple[int, ...]) -> Tensor:
        number = int("".join(map(str, text)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        logits = torch.randn(5, generator=generator) * 2
        logits[PAD] = -1e9
        return logits

    def __call__(self, new_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """A decoding step whose cache holds the texts in place of keys and values."""
        texts = new_ids[:, None, :, None]
        if cache is not None:
            texts = torch.cat([cache.layers[0][0], texts], 2)
        logits = torch.stack([self.logits(tuple(row)) for row in texts[:, 0, :, 0].tolist()])
        return logits, KeyValueCache(((texts, texts),))


def log_probs(step: RandomText, text: tuple[int, ...], config: DecodingConfig) -> float:
    """The sum of log-probabilities of a text after its start token; -inf for an end below the minimum length."""
    total = 0.0
    for i in range(1, len(text)):
        if text[i] == END and i < config.min_length:
            return -math.inf
        total += float(step.logits(text[:i]).log_softmax(-1)[text[i]])
    return total


def all_texts(max_length: int) -> list[tuple[int, ...]]:
    """Return every text that can be generated: of at most `max_length` tokens, and unended only at this length."""
    found = []
    for length in range(max_length):
        found += [(START, *text) for text in itertools.product(WORDS, repeat=length)]
    ended = [(*text, END) for text in found if len(text) < max_length]
    return ended + [text for text in found if len(text) == max_length]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    max_length=st.integers(2, 4),
    min_length=st.integers(0, 4),
    length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.5]),
    num_captions=st.integers(1, 3),
)
def test_beam_search_that_keeps_everything_finds_the_best_texts(
    seed: int, max_length: int, min_length: int, length_penalty: float, num_captions: int
) -> None:
    """With as many beams as there are texts; the score is the sum over length^penalty, the end token not counted."""
    min_length, num_beams = min(min_length, max_length), 3**max_length
    step = RandomText(seed)
    config = DecodingConfig(
        eos_id=END,
        pad_id=PAD,
        max_length=max_length,
        min_length=min_length,
        num_beams=num_beams,
        num_captions=num_captions,
        length_penalty=length_penalty,
        return_scores=True,
    )
    expected = {}
    for text in all_texts(max_length):
        length = len(text) - (text[-1] == END)
        expected[text] = log_probs(step, text, config) / length**length_penalty
    best = sorted(expected, key=lambda text: -expected[text])[:num_captions]
    decoded = decode(step, torch.tensor([[START]]), config)
    assert [tuple(token for token in row if token != PAD) for row in decoded.ids.tolist()] == best
    assert scores_of(decoded) == pytest.approx([expected[text] for text in best], rel=1e-4)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), is_sampled=st.booleans(), length_penalty=st.sampled_from([0.0, 1.0, -1.0]))
def test_scores_of_greedy_search_and_sampling_are_the_models_own(
    seed: int, is_sampled: bool, length_penalty: float
) -> None:
    step, torch_seed = RandomText(seed), torch.random.fork_rng(devices=[])
    config = DecodingConfig(
        eos_id=END,
        pad_id=PAD,
        max_length=5,
        use_nucleus_sampling=is_sampled,
        num_captions=3 if is_sampled else 1,
        temperature=1.5,
        repetition_penalty=1.3,
        length_penalty=length_penalty,
        return_scores=True,
    )
    with torch_seed:
        torch.manual_seed(seed)
        decoded = decode(step, torch.tensor([[START]] * 2), config)
    for row, score in zip(decoded.ids.tolist(), scores_of(decoded), strict=True):
        text = tuple(token for token in row if token != PAD)
        length = len(text) - (text[-1] == END)
        assert score == pytest.approx(log_probs(step, text, config) / length**length_penalty, rel=1e-4)


def scores_of(decoded: Decoded) -> list[float]:
    assert decoded.scores is not None
    return decoded.scores.tolist()


# settings


def test_none_leaves_a_setting_and_other_names_are_translated() -> None:
    assert BLIP.changed(num_beams=None, max_len=None) == BLIP
    changed = BLIP.changed(max_len=12, min_len=2, do_sample=True, num_return_sequences=4)
    assert changed == GenerationConfig(
        max_length=12, min_length=2, num_beams=3, use_nucleus_sampling=True, num_captions=4
    )
    assert BLIP.changed(max_new_tokens=5).changed(max_length=7) == BLIP.changed(max_length=7)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"num_beam": 4}, "num_beam: .*, num_beams, "),
        ({"eos_id": 4}, "eos_id"),
        ({"max_len": 4, "max_length": 5}, "max_len and max_length"),
        ({"max_length": 4, "max_new_tokens": 5}, "max_length and max_new_tokens"),
        ({"min_new_tokens": 4, "min_len": 5}, "min_new_tokens and min_len"),
        ({"num_beams": 0}, "num_beams: .* 0"),
        ({"num_beams": 2.5}, "num_beams: .* 2.5"),
        ({"max_length": 0}, "max_length: .* 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: .* 0"),
        ({"top_p": 1.5}, "top_p: .* 1.5"),
        ({"temperature": 0.0}, "temperature: .* 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty: .* nan"),
        ({"length_penalty": math.inf}, "length_penalty: .* inf"),
        ({"num_captions": 4}, "num_captions: 4.*num_beams 3"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        BLIP.changed(**changes)


def test_a_setting_without_its_name_is_refused() -> None:
    with pytest.raises(InputTypeError, match=r"by name, .*; got 7"):
        BLIP.changed(7, num_beams=2)


DEFAULTS = {
    "blip_caption": {"num_beams": 3, "max_length": 30, "min_length": 10},
    "blip2": {"num_beams": 3, "max_length": 30, "min_length": 10},
    "blip2_opt": {"num_beams": 5, "max_length": 30, "min_length": 1},
    "blip2_t5": {"num_beams": 5, "max_length": 30, "min_length": 1},
    "blip2_vicuna": {"num_beams": 5, "max_length": 30, "min_length": 1},
    "blip2_llm": {"num_beams": 5, "max_length": 30, "min_length": 1},
    "blip2_vicuna_instruct": {"num_beams": 5, "max_length": 256, "min_length": 1, "repetition_penalty": 1.5},
    "blip2_t5_instruct": {"num_beams": 5, "max_length": 256, "min_length": 1, "repetition_penalty": 1.5},
}
ANSWER_DEFAULTS = {
    "blip_vqa": {"num_beams": 3, "max_length": 10, "min_length": 1},
    **{
        arch: {"num_beams": 5, "max_length": 10, "min_length": 1, "length_penalty": -1.0}
        | ({"repetition_penalty": 1.5} if "instruct" in arch else {})
        for arch in DEFAULTS
        if arch.startswith("blip2_")
    },
}


def test_defaults_of_each_architecture() -> None:
    for table, name in ((DEFAULTS, "generation"), (ANSWER_DEFAULTS, "answer_generation")):
        for arch, expected in table.items():
            assert getattr(registry.get_model_class(arch), name) == GenerationConfig(**expected), arch


@pytest.mark.parametrize(("arch", "same"), [("blip2_opt", 7), ("blip2_t5", 6), ("blip2_vicuna_instruct", 7)])
def test_new_tokens_are_counted_without_the_start_token(arch: str, same: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six new tokens are a `max_length` of 7 for a causal model and of 6 for an encoder-decoder."""
    model, samples = build(arch), {"image": pictures(2), "prompt": "a photo of"}
    asked = {"image": pictures(2), "text_input": "what?"}
    written: list[Tensor] = []
    generate = model.lm.generate
    monkeypatch.setattr(model.lm, "generate", lambda *args: written.append(d := generate(*args)) or d)  # type: ignore[func-returns-value]
    assert model.generate(samples, max_new_tokens=6, min_new_tokens=6) == model.generate(
        samples, max_length=same, min_length=7
    )
    model.predict_answers(asked, max_new_tokens=6, min_new_tokens=6)
    model.predict_answers(asked, max_len=6, min_len=7)
    assert {tuple(decoded.ids.shape) for decoded in written} == {(2, 7)}  # type: ignore[attr-defined]


def test_new_tokens_are_counted_after_each_prompt() -> None:
    model = tiny("blip_caption")
    image, prompts = pictures(2), ["a picture of ", "a"]
    captions = model.generate({"image": image, "prompt": prompts}, max_new_tokens=5, min_new_tokens=5, num_beams=2)
    for row, prompt in enumerate(prompts):
        length = len(model.tokenizer(prompt).input_ids) - 1 + 5
        sample = {"image": image[row : row + 1], "prompt": prompt}
        assert model.generate(sample, max_length=length, min_length=length, num_beams=2) == [captions[row]]


def tiny(arch: str) -> Any:
    """A small BLIP model with spread random weights."""
    torch.manual_seed(3)
    med = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
    model = registry.get_model_class(arch)(
        image_size=32,
        vit={"width": 32, "depth": 2, "num_heads": 2, "patch_size": 16},
        med=med,
        tokenizer="shapes",
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5"])
def test_scores_are_transformers_sequences_scores(arch: str) -> None:
    """At a length penalty of 0: transformers counts other tokens in the length."""
    model, samples = build(arch), {"image": pictures(3), "prompt": ["a photo of"] * 3}
    scored = model.generate(samples, max_new_tokens=6, length_penalty=0.0, num_captions=2, return_scores=True)
    embeds, mask = model.prompt_embeds(samples, samples["prompt"])
    theirs = model.lm.model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=6,
        num_beams=5,
        num_return_sequences=2,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=model.lm.end_id,
        pad_token_id=model.lm.pad_id,
        output_scores=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(
        torch.tensor([score for _, score in scored]), theirs.sequences_scores, rtol=1e-4, atol=1e-4
    )
    assert [text for text, _ in scored] == model.generate(samples, max_new_tokens=6, length_penalty=0.0, num_captions=2)


@pytest.mark.parametrize("settings", [{}, {"use_nucleus_sampling": True, "num_captions": 2}])
@pytest.mark.parametrize("arch", ["blip_caption", "blip2_opt"])
def test_each_text_has_a_score(arch: str, settings: dict[str, Any]) -> None:
    model = tiny(arch) if arch == "blip_caption" else build(arch)
    drawn = []
    for return_scores in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate({"image": pictures(2)}, max_length=14, return_scores=return_scores, **settings))
    assert [text for text, _ in drawn[0]] == drawn[1]
    assert all(score < 0 for _, score in drawn[0])


def test_the_question_goes_into_the_prompt_of_blip_vqa() -> None:
    model, samples = tiny("blip_vqa"), {"image": pictures(2), "text_input": ["what color?", "how many?"]}
    complete = {**samples, "text_input": ["Q: what color? A:", "Q: how many? A:"]}
    settings = {"inference_method": "generate", "max_len": 6}
    assert model.predict_answers(samples, prompt="Q: {} A:", **settings) == model.predict_answers(complete, **settings)
    with pytest.raises(InputError, match=r"prompt: .*'\{\} \{\}'"):
        model.predict_answers(samples, prompt="{} {}", **settings)


@pytest.mark.parametrize(("arch", "method"), [("blip_caption", "generate"), ("blip_vqa", "predict_answers")])
def test_methods_say_which_settings_they_take(arch: str, method: str) -> None:
    call, samples = getattr(tiny(arch), method), {"image": pictures(2), "text_input": "what color?"}
    with pytest.raises(InputTypeError, match=r"by name, .*; got 5"):
        call(samples, 5)
    with pytest.raises(InputError, match=r"return_scores?: unknown .*max_length, .*num_beams, .*do_sample"):
        call(samples, **({"return_score": True} if method == "generate" else {"return_scores": True}))
