"""Random texts, images and settings into tiny models: each call answers, or raises the package's own error."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_lite.common.errors import UserError
from lavis_lite.models import load_model

CALLS = {
    "blip_caption": ("forward", "generate"),
    "blip_vqa": ("predict_answers",),
    "blip_classification": ("predict",),
    "blip_image_text_matching": ("forward",),
    "blip2_feature_extractor": ("extract_features",),
    "blip2_opt": ("forward", "generate", "predict_answers"),
    "blip2_t5_instruct": ("forward", "generate", "class_losses"),
}
PAIRS = [(arch, method) for arch, methods in CALLS.items() for method in methods]


@cache
def build(arch: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model(arch, "tiny", is_eval=True, **({"num_classes": 2} if "classification" in arch else {}))


@st.composite
def images(draw: st.DrawFn) -> Any:
    """Mostly two good images; else other shapes, types, values and things."""
    if draw(st.integers(0, 9)) < 5:
        return torch.zeros(2, 3, 48, 48)
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 48, 49]), max_size=6))
    if torch.Size(shape).numel() > 1_000_000:
        shape = shape[:3]
    image = torch.full(shape, draw(st.sampled_from([0.0, 1.0, 200.0, float("nan"), float("inf")])))
    kind = draw(st.sampled_from([None, torch.uint8, torch.bool, torch.float16, torch.float64, torch.complex64]))
    other = draw(st.sampled_from([False, False, None, "cat.jpg", b"", 3, [], [image], {"a": image}, ()]))
    return (image if kind is None else image.nan_to_num(0).to(kind)) if other is False else other


TEXT = st.text(st.characters(), max_size=30) | st.sampled_from(["a red circle", "", "{}", "{} {}", "\ud83d", "\x00"])
THING = st.sampled_from([None, 5, 1.5, b"red", float("nan"), {}, [], [None], ["a"], [["a"]], True, (1, 2)])
TEXTS = TEXT | st.lists(TEXT, min_size=2, max_size=2) | st.lists(TEXT | THING, max_size=3) | THING
NUMBER = st.integers(-2, 12) | st.sampled_from([None, "3", 2.5, float("nan"), float("inf"), True, [3], 0.0, 1.0, -1.0])
SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "generate": {
        **dict.fromkeys(("num_beams", "max_length", "min_length", "num_captions"), NUMBER),
        **dict.fromkeys(("top_p", "temperature", "repetition_penalty", "length_penalty"), NUMBER),
        "use_nucleus_sampling": st.booleans(),
    },
    "predict_answers": {
        **dict.fromkeys(("num_beams", "max_len", "min_len", "num_ans_candidates", "length_penalty"), NUMBER),
        "inference_method": st.sampled_from(["rank", "generate", "both", None]),
        "answer_list": st.lists(TEXT, max_size=3) | TEXTS,
    },
    "class_losses": {"candidates": st.lists(TEXT, max_size=3) | TEXTS, "n_segments": NUMBER},
    "extract_features": {"mode": st.sampled_from(["image", "text", "multimodal", "video", None])},
    "forward": {},
    "predict": {},
}


@st.composite
def keywords(draw: st.DrawFn, method: str) -> dict[str, Any]:
    """Some of the method's settings."""
    known = SETTINGS[method]
    names = draw(st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True)) if known else []
    found = {name: draw(known[name]) for name in names}
    if method == "class_losses":
        found.setdefault("candidates", ["red", "blue"])
    return found if method != "generate" else {"max_length": 6, **found}


@pytest.mark.parametrize(("arch", "method"), PAIRS)
@pytest.mark.slow
def test_answers_or_a_clear_error(arch: str, method: str) -> None:
    model = build(arch)

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        samples = {"image": data.draw(images(), "image"), "text_input": data.draw(TEXTS, "text_input")}
        keys = st.lists(st.sampled_from(["prompt", "context", "ocr_tokens", "label", "text_output"]), max_size=2)
        samples |= {"label": torch.tensor([0, 1])}
        samples |= {key: data.draw(TEXTS, key) for key in data.draw(keys)}
        arguments = data.draw(keywords(method), "settings")
        message = None
        try:
            with torch.no_grad():
                getattr(model, method)(samples, **arguments)
        except UserError as error:
            message = str(error)
        assert message is None or 25 < len(message) < 1000

    attempt()
