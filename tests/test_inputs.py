"""What the public methods of every architecture refuse: the message names the entry and says what is expected."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lavis_lite.common.config import zoo
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models import load_model

ARCHITECTURES = sorted(arch for arch, types in zoo.model_zoo if "tiny" in types)
NEEDED = {"blip_classification": {"num_classes": 3}}
TEXTS = ["a red circle", "what is there to the left of it"]
METHODS: dict[str, dict[str, Any]] = {
    "forward": {},
    "generate": {"max_length": 12},
    "predict_answers": {"inference_method": "generate", "max_len": 4},
    "predict": {},
    "class_losses": {"candidates": ["red", "two"]},
    "extract_features": {},
}
LEARNS = {name for name in ARCHITECTURES if not name.endswith(("_feature_extractor", "_image_text_matching"))}
PAIRS = [(arch, name) for arch in ARCHITECTURES for name in METHODS if hasattr(registry.get_model_class(arch), name)]

READING = [(arch, name) for arch, name in PAIRS if arch != "blip_image_classification"]


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(3))


@cache
def build(arch: str) -> Any:
    """The tiny type, the same for all tests; `build.__wrapped__` makes another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model(arch, "tiny", is_eval=True, **NEEDED.get(arch, {}))


def good_samples(arch: str) -> dict[str, Any]:
    images = ("image0", "image1") if arch == "blip_nlvr" else ("image",)
    samples = {key: pictures() for key in images} | {"text_input": list(TEXTS)}
    samples |= {"label": torch.tensor([0, 1]), "image_id": torch.tensor([0, 1]), "candidates": ["red", "two"]}
    samples |= {"caption": list(TEXTS)}
    return samples | {"answer": ["red", "blue"], "weight": torch.ones(2), "n_answers": torch.tensor([1, 1])}


def refused(call: Callable[[], Any], *words: str) -> None:
    """The call raises an InputError whose message has all the words and is one line."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def with_value(value: float) -> Tensor:
    image = pictures()
    image[1, 2, 3, 4] = value
    return image


BAD_IMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "none": (None, ("missing", "(B,3,H,W)")),
    "list": (list(pictures()), ("is a list", "one tensor")),
    "picture": (Image.new("RGB", (48, 48)), ("is a Image", "one tensor", 'vis_processors["eval"]')),
    "pictures": ([Image.new("RGB", (48, 48))] * 2, ("is a list", "one tensor")),
    "array": (pictures().numpy(), ("ndarray", "one tensor")),
    "path": ("cat.jpg", ("is a str", "one tensor")),
    "bytes": (b"\xff\xd8", ("is a bytes", "one tensor")),
    "number": (3, ("is a int", "one tensor")),
    "uint8": (pictures().to(torch.uint8), ("torch.uint8", "floating point")),
    "one image": (pictures()[0], ("(3, 48, 48)", "(B,3,H,W)", "unsqueeze(0)")),
    "colours last": (pictures().permute(0, 2, 3, 1), ("(2, 48, 48, 3)", "(B,3,H,W)")),
    "grey": (pictures()[:, :1], ("(2, 1, 48, 48)", "(B,3,H,W)")),
    "six axes": (pictures()[:, :, None, None], ("(2, 3, 1, 1, 48, 48)", "(B,3,H,W)")),
    "empty": (pictures(2)[:0], ("(0, 3, 48, 48)", "no image")),
    "no pixels": (pictures()[:, :, :0], ("(2, 3, 0, 48)", "no image")),
}
BAD_VALUES = {
    "nan": (with_value(float("nan")), ("nan or inf",)),
    "inf": (with_value(float("-inf")), ("nan or inf",)),
    "0 to 255": (torch.rand(2, 3, 48, 48) * 255, ("up to 25", "normalise")),
}
BAD_TEXTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "number": (5, ("5 is not a text or a list",)),
    "bytes": (b"red", ("b'red' is not a text or a list",)),
    "dict": ({"a": "b"}, ("is not a text or a list",)),
    "set": ({"a", "b"}, ("is not a text or a list",)),
    "nones": ([None, None], ("[0] is None", "a text (str)")),
    "bytes in a list": (["red", b"red"], ("[1] is b'red'", "a text (str)")),
    "numbers": ([1, 2], ("[0] is 1", "a text (str)")),
    "nan": (["red", float("nan")], ("[1] is nan", "a text (str)")),
    "array": (np.zeros(2), ("[0]", "a text (str)")),
    "half a character": (["red", "ok \ud83d"], ("[1] holds a lone surrogate, '\\ud83d' at position 3",)),
    "too many": (["a", "b", "c"], ("3 texts were given for 2 images",)),
    "too few": (["a"], ("1 texts were given for 2 images",)),
    "none": ([], ("0 texts were given for 2 images",)),
}


@pytest.mark.parametrize(("arch", "method"), PAIRS, ids=lambda value: value)
def test_bad_images(arch: str, method: str) -> None:
    model, samples, settings = build(arch), good_samples(arch), METHODS[method]
    state = copy.deepcopy(model.state_dict())
    answering = not (method == "forward" and arch in LEARNS)
    for key in ("image0", "image1") if arch == "blip_nlvr" else ("image",):
        for image, words in [*BAD_IMAGES.values(), *(BAD_VALUES.values() if answering else ())]:
            refused(lambda: call(model, method, {**samples, key: image}, settings), f"samples['{key}']", *words)  # noqa: B023
        missing = {name: value for name, value in samples.items() if name != key}
        refused(lambda: call(model, method, missing, settings), f"samples['{key}'] is missing", "(B,3,H,W)")  # noqa: B023
    refused(lambda: call(model, method, pictures(), settings), "samples must be a dict", "got a Tensor")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def call(model: Any, method: str, samples: Any, settings: dict[str, Any]) -> Any:
    return getattr(model, method)(samples, **settings)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_images_of_another_size(arch: str) -> None:
    samples = good_samples(arch)
    images = {key: value[..., :40] for key, value in samples.items() if key.startswith("image") and value.ndim == 4}
    refused(lambda: build(arch)({**samples, **images}), "(B, 3, 48, 48)", "image_size")


@pytest.mark.parametrize(("arch", "method"), READING, ids=lambda value: value)
def test_bad_texts(arch: str, method: str) -> None:
    """`prompt` where captions are written, else `text_input`."""
    model, samples, settings = build(arch), good_samples(arch), METHODS[method]
    keys = {"generate": ["prompt"], "class_losses": ["text_input", "prompt", "context"]}.get(method, ["text_input"])
    keys = ["text_input", "caption"] if arch == "blip_visdial" else keys
    for key in keys:
        for texts, words in BAD_TEXTS.values():
            refused(lambda: call(model, method, {**samples, key: texts}, settings), f"'{key}'", *words)  # noqa: B023
    ranks = method == "class_losses" or (method == "predict" and hasattr(model, "class_losses"))  # a prompt may do
    if "text_input" in keys and not ranks:
        refused(lambda: call(model, method, {**samples, "text_input": None}, settings), "'text_input'] is missing")
        del samples["text_input"]
        refused(lambda: call(model, method, samples, settings), "'text_input'] is missing")


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "method"), PAIRS, ids=lambda value: value)
def test_good_samples_are_answered(arch: str, method: str) -> None:
    """In other types too, with one text for all, in any script, and where values are odd but possible."""
    model, samples, settings = build(arch), good_samples(arch), METHODS[method]
    with torch.no_grad():
        odd = ["ein rötlicher Kreis 赤い 🟥", ["", "?" * 40], np.array(TEXTS), (text for text in TEXTS)]
        for change in ({}, *({"text_input": texts} for texts in odd)):
            assert_answered(call(model, method, {**samples, **change}, settings))
        twice = {
            key: value.double() if key.startswith("image") and value.ndim == 4 else value
            for key, value in samples.items()
        }
        assert_answered(call(model, method, twice, settings))


def assert_answered(result: Any) -> None:
    """Texts for both samples, or finite numbers; of nested results each."""
    if isinstance(result, torch.Tensor):
        assert result.numel()
        assert not result.is_floating_point() or result.isfinite().all()
    elif isinstance(result, Mapping):
        assert result
        for value in result.values():
            assert_answered(value)
    elif isinstance(result, (list, tuple)):
        assert len(result) == 2
        for value in result:
            assert_answered(value)
    else:
        assert isinstance(result, (str, int, float, type(None)))


@pytest.mark.parametrize(
    ("arch", "key", "value", "words"),
    [
        ("blip_classification", "label", None, ("missing",)),
        ("blip_classification", "label", [0, 1, 2], ("shape (3,)", "2 integers")),
        ("blip_classification", "label", ["a", "b"], ("['a', 'b']", "2 integers")),
        ("blip_classification", "label", [0, 3], ("holds 3", "from 0 to 2")),
        ("blip_nlvr", "label", torch.tensor([0, -1]), ("holds -1", "from 0 to 1")),
        ("blip_nlvr", "label", torch.tensor([0.5, 1.0]), ("torch.float32", "2 integers")),
        ("blip_retrieval", "image_id", None, ("missing",)),
        ("blip_retrieval", "image_id", ["a", "b"], ("2 integers",)),
        ("blip2", "image_id", [1, 2, 3], ("2 integers",)),
        ("blip_vqa", "n_answers", None, ("missing",)),
        ("blip_vqa", "n_answers", torch.tensor([1, 2]), ("3 answers in all", "has 2 texts")),
        ("blip_vqa", "answer", None, ("missing",)),
        ("blip_vqa", "weight", None, ("missing",)),
        ("blip_vqa", "answer", ["red", None], ("[1] is None",)),
        ("blip2_t5", "text_output", ["red", None], ("[1] is None",)),
        ("blip2_t5", "text_output", ["red"], ("1 texts were given for 2 images",)),
        ("blip_nlvr", "image1", pictures(3), ("(2, 3, 48, 48)", "(3, 3, 48, 48)")),
    ],
)
def test_bad_training_entries(arch: str, key: str, value: Any, words: tuple[str, ...]) -> None:
    model, samples = build(arch), {**good_samples(arch), key: value}
    refused(lambda: model(samples), f"'{key}'", *words)
    if key == "label":
        refused(lambda: model.predict(samples), f"'{key}'", *words)


@pytest.mark.parametrize("arch", ["blip_vqa", "blip2_opt", "blip2_t5_instruct"])
def test_bad_answer_lists(arch: str) -> None:
    for answers in ("red", ["red", None], ["red", 3], ["ok \ud83d"], [], {"red", "blue"}, ["red", ""], [" "]):
        settings = {"inference_method": "rank", "answer_list": answers}
        refused(lambda: build(arch).predict_answers(good_samples(arch), **settings), "answer_list")  # noqa: B023
    settings = {"inference_method": "rank", "answer_list": ["red"], "num_ans_candidates": 0}
    refused(lambda: build(arch).predict_answers(good_samples(arch), **settings), "num_ans_candidates", "from 1 to")


@pytest.mark.parametrize("key", ["ocr_tokens", "choices"])
def test_bad_word_lists(key: str) -> None:
    model, samples = build("blip2_t5_instruct"), {"image": pictures(), "text_input": TEXTS}
    for words in (None, 5, "red", ["red", "blue"], [None, None], [["red"], [None]], [["red"]], [[b"x"], ["y"]]):
        asked = {**samples, key: words}
        refused(lambda: model.predict_answers(asked, prompt="{} of {}"), f"'{key}'")  # noqa: B023


@pytest.mark.parametrize("arch", ["blip2_t5", "blip2_t5_instruct"])
def test_a_question_of_100_000_characters_is_refused(arch: str) -> None:
    """T5's positions are relative: nothing else would stop attention that takes hundreds of gigabytes."""
    model = build(arch)
    samples = {"image": pictures(1), "text_input": ["is it red? " * 9_100], "prompt": "is it red? " * 9_100}
    for method in ("generate", "predict_answers", "class_losses"):
        refused(lambda: call(model, method, samples, METHODS[method]), "context has 2048", "shorten the prompt")  # noqa: B023


# Texts that are cut


LONG = "a red circle to the left of a blue star and a green square above it " * 5


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The messages about texts that were cut."""
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.message for record in caplog.records if "max_txt_len" in record.message]


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name not in LEARNS])
def test_texts_are_cut_alike_and_it_is_said_once(arch: str, warnings_of: Callable[[], list[str]]) -> None:
    """Whatever is asked for reads the same tokens: those that fit into max_txt_len, [SEP] included."""
    model, image = build.__wrapped__(arch), pictures(3)
    texts = ["a red circle", LONG, LONG + "and more"]
    lengths = [len(model.tokenizer(text).input_ids) for text in texts]
    assert lengths[0] < model.max_txt_len < lengths[1]
    short = model.tokenizer.decode(model.tokenizer(LONG).input_ids[1 : model.max_txt_len - 1])
    calls = [{"match_head": "itm"}, {"match_head": "itc"}] if "matching" in arch else [{"mode": "text"}, {}]
    with torch.no_grad():
        for settings in calls:
            model({"image": image, "text_input": [texts[0], short, short]}, **settings)
            assert not warnings_of()
        found = [model({"image": image, "text_input": texts}, **settings) for settings in calls]
        cut = [model({"image": image, "text_input": [texts[0], short, short]}, **settings) for settings in calls]
    for one, other in zip(found, cut, strict=True):
        for key in one if isinstance(one, dict) else [...]:
            assert torch.equal(one[key], other[key])
    (message,) = warnings_of()
    assert f"2 of 3 texts are longer than max_txt_len={model.max_txt_len} tokens" in message
    assert f"the longest has {max(lengths)}" in message


def test_features_are_those_that_are_matched() -> None:
    """The cosine of a long text's feature with the image's is what the matching model answers with the same weights."""
    image = pictures(1)
    for family in ("blip", "blip2"):
        extractor, matcher = (
            copy.deepcopy(build(f"{family}_{n}")) for n in ("feature_extractor", "image_text_matching")
        )
        missing = matcher.load_state_dict(extractor.state_dict(), strict=False).missing_keys
        assert all(name.startswith("itm_head.") for name in missing)
        samples = {"image": image, "text_input": [LONG]}
        with torch.no_grad():
            text = extractor.extract_features(samples, mode="text")["text_embeds_proj"][:, 0]
            seen = extractor.extract_features(samples, mode="image")["image_embeds_proj"]
            sims = (seen[:, :1] if family == "blip" else seen) @ text[0]
            torch.testing.assert_close(matcher(samples, match_head="itc")[0], sims.amax(dim=1))


@pytest.mark.parametrize("arch", ["blip_retrieval", "blip2"])
def test_a_gallery_says_how_many_of_its_texts_are_cut(arch: str, warnings_of: Callable[[], list[str]]) -> None:
    class Gallery(list):
        text = (*["a red circle"] * 300, LONG, LONG)
        dataset = property(lambda self: self)

    model = build.__wrapped__(arch)
    for _ in range(2):
        model.compute_sim_matrix(Gallery([{"image": pictures(1), "index": torch.tensor([0])}]), 1)
    (message,) = warnings_of()
    assert "2 of 302 texts are longer" in message
