"""Damaged annotation files of every reader: each ends in a dataset whose samples can be read, or in a UserError."""

import contextlib
import copy
import json
import random
from pathlib import Path
from typing import Any

import annotation_cases as cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_lite.common.errors import UserError
from lavis_lite.datasets import visual

READERS = [names.split()[0] for names in cases.BY_READER] + [
    *("retrieval", "pairs", "coco_caption_instruct", "coco_vqa_instruct", "vqg_coco_vqa", "aok_vqa_instruct"),
    *("snli_ve_instruct", "ocr_vqa_instruct", "textcaps_caption_instruct", "vsr_caption"),
]
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        5,
        1.5,
        float("nan"),
        float("inf"),
        10**30,
        "",
        " ",
        "\n",
        "..!",
        "?",
        "NaN",
        "null",
    ),
    *("\ud83d", "caf\ud83d", "\0", "a\0b", "['yes', 'no']", "日本", "🟥", "a" * 5000, "../a.png", "/", "a.png", "1"),
    *([], [None], [[]], [1], [""], ["a", "a"], ["a", "\ud83d"], {}, {"a": 1}, {"answer": None}, [{"answer": [1]}]),
)
NAMES = ("image", "caption", "image_id", "instance_id", "question_id", "label", "candidates", "text", "data", "")
OTHERS = {
    "coco": {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]},
    "official": {
        "data_subtype": "val2014",
        "questions": [{"question_id": 1, "question": "what?", "image_id": 1}],
        "annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}],
    },
    "answers": {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]},
    "list": ["yes", "no"],
    "messages": [
        {"image": "a.png", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    ],
}
"""Other forms that some of the readers take too."""


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested lists and objects."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The content with this value at the path."""
    if not path:
        return value
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return content


def damaged(content: Any, draw: random.Random) -> Any:
    """The content with one thing changed: a value, a field more or less, a record twice."""
    found = places(content)
    path = draw.choice(found)
    inside = content
    for key in path:
        inside = inside[key]
    way = draw.randrange(6)
    if way == 0 and isinstance(inside, dict) and inside:
        del inside[draw.choice(list(inside))]
    elif way == 1 and isinstance(inside, dict):
        inside[draw.choice(NAMES)] = copy.deepcopy(draw.choice(ODD))
    elif way == 2 and isinstance(inside, list) and inside:
        inside.append(copy.deepcopy(draw.choice(inside)))
    elif way == 3 and isinstance(inside, dict) and inside:
        inside[draw.choice(NAMES)] = inside.pop(draw.choice(list(inside)))
    else:
        return put(content, path, copy.deepcopy(draw.choice(ODD)))
    return content


def broken_bytes(data: bytes, draw: random.Random) -> bytes:
    """The file cut, or with bytes put in or changed."""
    at = draw.randrange(len(data) + 1)
    way = draw.randrange(4)
    if way == 0:
        return data[:at]
    if way == 1:
        return data[:at] + draw.choice((b"\xff", b"\0", b'"', b"\n", b",", b";", b"[" * 3000, b"9" * 5000)) + data[at:]
    if way == 2:
        return bytes(byte ^ 1 << draw.randrange(8) if number == at else byte for number, byte in enumerate(data))
    return draw.choice((b"", b"\n", b"\xef\xbb\xbf", data.replace(b",", b";"), data.replace(b"\n", b"\r"), data + data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    cases.pictures(path)
    return path


@pytest.fixture(autouse=True)
def frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are not decoded here."""
    monkeypatch.setattr(visual, "read_frames", lambda path, count, processor, **_: torch.zeros(3, count, 2, 2))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", dict.fromkeys(READERS))
@settings(max_examples=24, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**9), changes=st.integers(0, 3), is_broken=st.integers(0, 5), other=st.integers(0, 9))
@pytest.mark.slow
def test_a_damaged_file_is_read_or_refused(
    folder: Path, name: str, suffix: str, seed: int, changes: int, is_broken: int, other: int
) -> None:
    draw = random.Random(seed)
    content = copy.deepcopy(draw.choice(list(OTHERS.values())) if other == 0 else cases.GOOD[name])
    for _ in range(changes):
        content = damaged(content, draw)
    path = cases.write(folder / f"fuzzed{suffix}", content)
    if is_broken == 0:
        path.write_bytes(broken_bytes(path.read_bytes(), draw))
    split = draw.choice(("train", "val"))
    options = {"blank_texts": draw.choice(("error", "skip"))}
    if name == "aok_vqa_instruct":
        options["multiple_choice"] = True
    with contextlib.suppress(UserError):
        cases.use(cases.build(name, split, path, folder, **options))


TRUTHS = {"annotations": OTHERS["official"]["annotations"]}
ASKED = {key: value for key, value in OTHERS["official"].items() if key != "annotations"}
WORDS = {"data": [{"image_id": "a", "ocr_tokens": ["x"]}]}
TOGETHER = (
    *(("vqa", [ASKED, TRUTHS, OTHERS["list"]]), ("vqa", [cases.QUESTIONS, OTHERS["list"], TRUTHS])),
    *(("coco_vqa_instruct", [ASKED, TRUTHS]), ("textvqa", [cases.GOOD["textvqa"], WORDS])),
    *(("textcaps_caption_instruct", [cases.TEXTCAPS, WORDS]), ("caption", [cases.CAPTIONS, OTHERS["coco"]])),
)


@pytest.mark.parametrize(("name", "contents"), TOGETHER)
@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**9), changes=st.integers(1, 4))
@pytest.mark.slow
def test_damaged_files_that_belong_together(
    folder: Path, name: str, contents: list[Any], seed: int, changes: int
) -> None:
    draw, contents = random.Random(seed), copy.deepcopy(contents)
    for _ in range(changes):
        number = draw.randrange(len(contents))
        contents[number] = damaged(contents[number], draw)
    paths = [cases.write(folder / f"part{number}.json", content) for number, content in enumerate(contents)]
    with contextlib.suppress(UserError):
        cases.use(cases.build(name, draw.choice(("train", "val")), paths, folder))


def test_the_good_files_are_good(folder: Path) -> None:
    """Nothing above is refused for the file's form itself."""
    for name, content in cases.GOOD.items():
        path = cases.write(folder / "good.json", json.loads(json.dumps(content)))
        dataset = cases.build(name, "train", path, folder)
        assert len(dataset) > 0, name
        cases.use(dataset)
