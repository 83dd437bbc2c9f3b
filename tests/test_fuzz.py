"""Nonsense into every reader of text and pictures: a result, or an error that tells the user what is wrong.

The cases are drawn by hypothesis from fixed seeds, so each run tries the same ones.
"""

import dataclasses
import io
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_lite.common.config.config import Config, RunConfig
from lavis_lite.common.config.files import load_yaml, parse_options
from lavis_lite.common.errors import UserError
from lavis_lite.common.image_io import formats
from lavis_lite.common.video_io import decode
from lavis_lite.datasets.image import open_image
from lavis_lite.models.tokenizers import blip2_tokenizer, blip_tokenizer, tokenize
from lavis_lite.processors import load_processor

BASE = """model: {arch: blip_caption, model_type: tiny}
datasets: {shapes_caption: {num_train: 8, vis_processor: {train: {name: blip_image_train, image_size: 48}}}}
run: {task: captioning, init_lr: 1e-4, valid_splits: [val]}
"""


def cases(number: int) -> Callable[[Any], Any]:
    """That many examples, the same in every run."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No code that a text names may run, and none may be found in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "os.popen", "subprocess.Popen", "builtins.input"):
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def outcome(act: Callable[[], Any], *, naming: object = "") -> Any:
    """The result, or None if the user was told what is wrong, and where."""
    try:
        return act()
    except UserError as error:
        if len(str(error)) < 10 or str(naming) not in str(error):
            pytest.fail(f"{type(error).__name__} says too little: {error}")
        return None


# YAML

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "1e308",
            "-1e308",
            "~",
            "null",
            "???",
            "${run}",
            "${model.arch}",
            "${oc.env:NOPE}",
            "${",
            "[",
            "{a: ",
            "!!int x",
            "!!timestamp 2001-01-01100",
            "!!python/object/apply:os.system [ls]",
            "!!binary =",
            "&a [*a]",
            "*a",
            "9" * 5000,
            "2001-01-01",
            "../../x",
            "\0",
            "a b: c",
            "- -",
            "'",
            '"\\x',
            "\t",
            "%YAML 9",
            "---",
            "...",
        ]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    ("model",),
    ("datasets",),
    ("run",),
    ("imports",),
    ("preprocess",),
    ("expected",),
    ("nonsense",),
    ("_base_",),
    *[
        ("model", key)
        for key in (
            "arch",
            "model_type",
            "image_size",
            "vit",
            "med",
            "prompt",
            "tokenizer",
            "checkpoint",
            "med_config_path",
            "load_pretrained",
            "init_text",
            "nonsense",
        )
    ],
    ("datasets", "shapes_caption"),
    ("datasets", "nonsense"),
    ("datasets", "../x"),
    *[
        ("datasets", "shapes_caption", key)
        for key in (
            "type",
            "builder",
            "num_train",
            "noise_share",
            "colors",
            "build_info",
            "vis_processor",
            "text_processor",
            "relations",
        )
    ],
    *[
        ("datasets", "shapes_caption", "vis_processor", *rest)
        for rest in (
            ("train",),
            ("eval",),
            ("x",),
            ("train", "name"),
            ("train", "image_size"),
            ("train", "mean"),
            ("train", "background"),
        )
    ],
    *[("preprocess", *rest) for rest in (("vis_processor",), ("text_processor",), ("text_processor", "train", "name"))],
    *[("run", field.name) for field in dataclasses.fields(RunConfig)],
    *[("run", key) for key in ("num_beams", "max_len", "temperature", "metrics", "annotation_file", "nonsense", "gpu")],
]


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The base configuration with one key set."""
    tree = yaml.safe_load(BASE)
    node = tree
    for part in path[:-1]:
        node[part] = node[part] if isinstance(node.get(part), dict) else {}
        node = node[part]
    node[path[-1]] = value
    return tree


@pytest.mark.slow
@cases(400)
@given(path=st.sampled_from(KEYS), value=VALUES)
def test_nonsense_under_any_key(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    file = tmp_path / "a.yaml"
    with_surrogates = yaml.safe_dump(with_value(path, value), allow_unicode=True)
    file.write_bytes(with_surrogates.encode(errors="replace"))
    config = outcome(lambda: Config.from_file(file))
    if config is not None:
        again = tmp_path / "again.yaml"
        again.write_text(config.to_yaml(), encoding="utf-8")
        assert outcome(lambda: Config.from_file(again)) is not None, "what was accepted is written as it can be read"


@pytest.mark.slow
@cases(500)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(BASE)), st.integers(0, 12), st.text(max_size=3) | SCALARS), max_size=4)
)
@example(edits=[(len(BASE), 0, "expected: " + "[" * 3000 + "]" * 3000)])
@example(edits=[(len(BASE), 0, "expected: " + "{a: " * 3000 + "1" + "}" * 3000)])
@example(edits=[(len(BASE), 0, "expected: " + "9" * 6000)])
@example(edits=[(len(BASE), 0, "expected: !!timestamp 2001-01-01100")])
@example(edits=[(len(BASE), 0, "expected: !!int x")])
def test_a_mutated_yaml(tmp_path: Path, edits: list[tuple[int, int, Any]]) -> None:
    text = BASE
    for at, removed, added in edits:
        text = text[:at] + str(added) + text[at + removed :]
    file = tmp_path / "a.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome(lambda: Config.from_file(file))


@cases(400)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_yaml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    outcome(lambda: load_yaml(file))


OPTIONS = st.one_of(
    st.builds(lambda path, value: f"{'.'.join(path)}={value}", st.sampled_from(KEYS), VALUES),
    st.builds(lambda path, text: f"{'.'.join(path)}={text}", st.sampled_from(KEYS), st.text(max_size=10)),
    st.text(max_size=12),
)


@pytest.mark.slow
@cases(300)
@given(options=st.lists(OPTIONS, min_size=1, max_size=3))
@example(options=["run.seed=\ud800"])
@example(options=["\udcff=1"])
@example(options=["expected=!!bool x"])
def test_any_options(tmp_path: Path, options: list[str]) -> None:
    outcome(lambda: parse_options(options))
    file = tmp_path / "a.yaml"
    file.write_text(BASE)
    outcome(lambda: Config.from_file(file, options))


# pictures


def pictures() -> dict[str, bytes]:
    """A small file of every format, in several modes."""
    found = {}
    noise = random.Random(0).randbytes(13 * 11 * 4)
    for suffix, mode, more in [
        ("png", "RGB", {}),
        ("png", "RGBA", {}),
        ("png", "P", {}),
        ("png", "I;16", {}),
        ("png", "L", {"transparency": 3}),
        ("jpg", "RGB", {}),
        ("jpg", "CMYK", {}),
        ("gif", "P", {"save_all": True}),
        ("bmp", "RGB", {}),
        ("bmp", "1", {}),
        ("tif", "RGB", {}),
        ("tif", "F", {}),
        ("tif", "I", {}),
        ("tif", "RGB", {"compression": "tiff_lzw"}),
        ("ppm", "RGB", {}),
        ("webp", "RGBA", {}),
        ("avif", "RGBA", {}),
        ("jp2", "RGB", {}),
    ]:
        if suffix == "avif" and "AVIF" not in formats():
            continue
        image = Image.frombytes("RGBA", (13, 11), noise)
        if mode == "F":
            image = image.convert("F")
        elif mode.startswith("I"):
            image = Image.frombytes("I;16", (13, 11), noise[: 13 * 11 * 2]).convert(mode if mode == "I" else "I;16")
        else:
            image = image.convert("RGB").convert(mode) if mode != "RGBA" else image
        frames = [image.transpose(Image.Transpose.ROTATE_180)] if "save_all" in more else []
        stream = io.BytesIO()
        image.save(
            stream,
            {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix.upper()),
            **more,
            **({"append_images": frames} if frames else {}),
        )
        found[f"{suffix} {mode} {','.join(more)}"] = stream.getvalue()
    return found


PICTURES = pictures()
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["flip", "cut", "zero", "add", "ff"]), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits: list[tuple[float, str, int]]) -> bytes:
    for where, kind, value in edits:
        at = int(where * (len(content) - 1)) if content else 0
        if kind == "cut":
            content = content[: max(at, 8)]
        elif kind == "add":
            content = content[:at] + bytes([value]) * (value % 9 + 1) + content[at:]
        else:
            byte = {"flip": content[at] ^ (1 << value % 8), "zero": 0, "ff": 255}[kind] if content else 0
            content = content[:at] + bytes([byte]) + content[at + 1 :]
    return content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@cases(1200)
@given(name=st.sampled_from(sorted(PICTURES)), edits=EDITS)
def test_a_mutated_picture(tmp_path: Path, name: str, edits: list[tuple[float, str, int]]) -> None:
    path = tmp_path / f"a.{name.partition(' ')[0]}"
    path.write_bytes(edited(PICTURES[name], edits))
    image = outcome(lambda: open_image(path, max_pixels=10**6), naming=path)
    if image is not None:
        assert image.mode == "RGB"
        image.tobytes()


@pytest.mark.filterwarnings("ignore")
@cases(200)
@given(
    name=st.sampled_from([name for name in sorted(PICTURES) if name.startswith(("gif", "png", "webp"))]), edits=EDITS
)
def test_a_mutated_animation(tmp_path: Path, name: str, edits: list[tuple[float, str, int]]) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(PICTURES[name][:12] + edited(PICTURES[name], edits)[12:])  # the first bytes say what it is
    frames = outcome(lambda: decode(path, 3), naming=path)
    if frames is not None:
        assert [frame.mode for frame in frames] == ["RGB"] * 3


# texts

TEXTS = st.one_of(
    st.text(st.characters(), max_size=40),
    st.text(st.characters(categories=["Cs", "Cc", "Lo", "Mn", "So", "Zs"]), max_size=20),
    st.sampled_from(["", " ", "\0", "[CLS] [DEC] [ENC]", "a" * 20_000, "a " * 9_000, "\ud83d", "é" * 500, "\u202e x"]),
)
PROCESSORS = [
    load_processor("blip_caption", {"prompt": "a picture of "}),
    load_processor("blip_caption", {"max_words": 1}),
    load_processor("blip_question"),
    *[load_processor("blip_instruction", {"task": task}) for task in ("caption", "qa", "classification", "eval")],
]
TOKENIZERS = [blip_tokenizer("shapes"), blip2_tokenizer("shapes", truncation_side="left")]


@cases(800)
@given(text=TEXTS)
def test_any_text_in_text_processors(text: str) -> None:
    for processor in PROCESSORS:
        assert isinstance(processor(text), str)


@pytest.mark.slow
@cases(400)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), max_length=st.none() | st.integers(3, 40))
def test_any_text_in_tokenizers(texts: list[str], max_length: int | None) -> None:
    for tokenizer in TOKENIZERS:
        is_text = not any("\ud800" <= character <= "\udfff" for text in texts for character in text)
        tokens = outcome(lambda tokenizer=tokenizer: tokenize(tokenizer, texts, max_length=max_length))
        assert (tokens is not None) == is_text
        assert tokens is None or tokens[0].shape == tokens[1].shape == (len(texts), tokens[0].shape[1])


def test_warnings_of_pillow_stay_warnings(tmp_path: Path) -> None:
    """A file whose metadata is odd is read, also where warnings are errors."""
    (tmp_path / "a.tif").write_bytes(PICTURES["tif RGB "])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.tif").size == (13, 11)
