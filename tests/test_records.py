"""The check of annotation records: every builder goes through it, and every mistake names file, record and field."""

import copy
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import annotation_cases as cases
import pytest
import torch
from PIL import Image

from lavis_lite.common.errors import InputError
from lavis_lite.common.logger import JsonLog, setup
from lavis_lite.common.records import TEXTS, RecordCheck, shown
from lavis_lite.common.registry import registry
from lavis_lite.datasets import visual
from lavis_lite.datasets.annotations import read_records
from lavis_lite.tasks.captioning import CaptionTask
from lavis_lite.tasks.results import write_json

UNREAD = {("ivqa", "start"), ("ivqa", "end"), ("scienceqa", "lecture"), ("scienceqa_instruct", "lecture")}
"""Fields of the published files that the builders do not read as they are set here."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cases.pictures(tmp_path)
    monkeypatch.setattr(visual, "read_frames", lambda path, count, processor, **_: torch.zeros(3, count, 2, 2))
    return tmp_path


def first_record(content: Any) -> dict[str, Any]:
    """The first record in a file's content: of a list, of an object of records, or of what is under `data`."""
    if isinstance(content, dict) and "data" in content:
        content = content["data"].get("dialogs") if isinstance(content["data"], dict) else content["data"]
    return content[0] if isinstance(content, list) else next(iter(content.values()))


def build(folder: Path, content: Any, *, split: str = "train", kind: str = "json", **options: Any) -> Any:
    """The dataset of one file: content as JSON, or a text as it is; of the builder `caption`, or of `name`."""
    path, name = folder / f"own.{kind}", options.pop("name", "caption")
    if isinstance(content, str):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    else:
        cases.write(path, content)
    return cases.build(name, split, path, folder, **options)


# Every builder


def test_every_builder_has_a_good_file() -> None:
    own = ("shapes", "openmoji", "openclipart", "fashion_mnist")  # make their records themselves
    assert {name for name in registry.list_builders() if not name.startswith(own)} == cases.GOOD.keys()


@pytest.mark.parametrize("name", cases.GOOD)
def test_every_builder_checks_its_fields(folder: Path, name: str) -> None:
    """A good file makes samples; an object in any field that is read is refused with file, record and field."""
    dataset = build(folder, cases.GOOD[name], name=name)
    cases.use(dataset)
    assert dataset.fields
    for field in first_record(cases.GOOD[name]):
        if (name, field) in UNREAD:
            continue
        content = copy.deepcopy(cases.GOOD[name])
        first_record(content)[field] = {"a": {"b": 1}}
        with pytest.raises(InputError) as caught:
            build(folder, content, name=name)
        for words in (str(folder / "own.json"), "record 0", field):
            assert words in str(caught.value), (field, words)


# What a field may hold

PICTURE = {"image": "a.png"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a.png"}, "has no field 'caption'; fields there: 'image'"),
        ({"image": "a.png", "caption": None}, "field 'caption' is null"),
        ({"image": "a.png", "caption": []}, "field 'caption' is an empty list"),
        ({"image": "a.png", "caption": 5}, "field 'caption' is 5, a number; expected a text or a list of texts"),
        ({"image": "a.png", "caption": float("nan")}, "field 'caption' is NaN; expected a text .* leave the field out"),
        ({"image": "a.png", "caption": True}, "field 'caption' is true, a truth value"),
        ({"image": "a.png", "caption": {"a": 1}}, r'field \'caption\' is \{"a": 1\}, an object'),
        ({"image": "a.png", "caption": [[]]}, r"field 'caption' \(item 0 of the list\) is \[\], a list"),
        ({"image": "a.png", "caption": ["x", None]}, r"field 'caption' \(item 1 of the list\) is null"),
        (
            {"image": "a.png", "caption": ""},
            "field 'caption' is empty; .*remove the record, or .*blank_texts: skip",
        ),
        ({"image": "a.png", "caption": " \n"}, r'field \'caption\' is " \\n", blank; expected'),
        ({"image": "a.png", "caption": "..!"}, r'field \'caption\' is "\.\.!", blank once cleaned'),
        ({"image": "a.png", "caption": "caf\ud83d"}, r'is "caf\\ud83d", which holds half a character'),
        (
            {"image": "a.png", "caption": "['a', 'b']"},
            r"a list written as one text; write the list itself, in",
        ),
        ({"image": 5, "caption": "x"}, "field 'image' is 5, a number; expected the path of a file"),
        ({"image": "", "caption": "x"}, "field 'image' is empty"),
        ({"image": "a\0.png", "caption": "x"}, "field 'image' .* holds a NUL character"),
        (
            {"image": "a.png", "caption": "x", "image_id": [1]},
            r"field 'image_id' is \[1\], a list; expected a text",
        ),
        ({"image": "a.png", "text": "x"}, "no field 'caption'; fields there: 'image', 'text'"),
        ({"image_path": "a.png", "caption": "x"}, "no field 'image' or 'file_name'; fields there: 'image_path'"),
        ({"image": "a.png", " Caption": "x"}, "fields there: 'image', ' Caption'"),
    ],
)
def test_mistakes_in_captions_are_named(folder: Path, record: dict[str, Any], message: str) -> None:
    good = {"image": "b.png", "caption": ["NaN", "日本", "?", "null", "🟥"]}
    assert len(build(folder, [good])) == 5
    with pytest.raises(InputError, match=rf"own\.json: record 1.*{message}"):
        build(folder, [good, record])


def test_file_names_that_are_not_utf8_are_paths(folder: Path) -> None:
    """The operating system's names for them hold lone surrogates, one for each byte."""
    name = os.fsdecode(b"caf\xe9.png")
    picture = Image.new("RGB", (2, 2), (7, 0, 0))
    picture.putpixel((1, 1), (0, 0, 0))  # else its name is logged, which pytest-xdist cannot send
    picture.save(folder / "new.png")
    os.rename(folder / "new.png", folder / name)
    assert build(folder, [{"image": name, "caption": "x"}])[0]["image"].item() == 7
    with pytest.raises(InputError, match="half a character"):
        build(folder, [{"image": "caf\ud83d.png", "caption": "x"}])


def test_numbers_are_answers_and_ids_but_no_captions(folder: Path) -> None:
    question = {"image": "a.png", "question": "how many?", "question_id": 1.5}
    train = build(folder, [{**question, "answer": 2}, {**question, "answer": [2, "two"], "question_id": 3}], name="vqa")
    assert [train[i]["answer"] for i in range(2)] == [["2"], ["2", "two"]]
    assert [train[i]["weight"] for i in range(2)] == [[1.0], [0.5, 0.5]]
    for answer in (True, None, float("nan"), "", [""], [None], {"a": 1}, [[]]):
        with pytest.raises(InputError, match="record 0"):
            build(folder, [{**question, "answer": answer}], name="vqa")
    truth = build(folder, [{**question, "answer": ["", "two"]}], name="vqa", split="val")
    assert truth.annotation[0]["answers"] == ["", "two"]  # people leave answers blank; none of ours equals it


def test_references_may_be_missing_but_not_blank(folder: Path) -> None:
    for none in ({}, {"caption": []}, {"caption": None}):
        assert build(folder, [{"image": "a.png", **none}], split="val").references() == {}
    with pytest.raises(InputError, match=r"\(item 1 of the list\) is empty"):
        build(folder, [{"image": "a.png", "caption": ["x", ""]}], split="val")
    with pytest.raises(InputError, match="'caption' is an empty list"):
        build(folder, [{"image": "a.png", "caption": []}], name="retrieval", split="val")


def test_blank_texts_can_be_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        {"image": "a.png", "caption": ["", "a"]},
        {"image": "b.png", "caption": "..."},
        {"image": "b.png", "caption": "b", "image_id": {}},
    ]
    with pytest.raises(InputError, match="record 2: field 'image_id'"):
        build(folder, records, blank_texts="skip")
    records[2]["image_id"] = 2
    dataset = build(folder, records, blank_texts="skip")
    assert [dataset[i]["text_input"] for i in range(len(dataset))] == ["a", "b"]
    assert "own.json: blank texts of 2 of 3 records are left out, and 1 of these records" in caplog.text
    records.append({"image": "a.png", "caption": "c", "image_id": 2})
    with pytest.raises(InputError, match=r"record 2 \(b\.png\) and .*record 3 \(a\.png\)"):  # numbers of the file
        build(folder, records, blank_texts="skip")
    questions = [{"image": "a.png", "question": "what?", "answer": ["", "x", "x"]}] * 2 + [
        {"image": "a.png", "question": "what?", "answer": ""}
    ]
    assert [s["weight"] for s in build(folder, questions, name="vqa", blank_texts="skip")] == [[1.0], [1.0]]
    with pytest.raises(InputError, match="record 1 has no field 'answer' or 'answers'"):
        build(folder, [questions[0], {"image": "a.png", "question": "what?"}], name="vqa", blank_texts="skip")
    with pytest.raises(InputError, match="blank_texts: 'drop' is not one of error, skip"):
        build(folder, records, blank_texts="drop")


# Files


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("tsv", "image,caption\na.png,x\n", r"separated by a comma \(','\), those of a \.tsv file by a tab"),
        ("csv", "image,caption\n", "holds no records"),
        ("csv", "", "is empty"),
        ("csv", "image,caption\n\na.png\n", "line 3 has 1 columns, not 2 as the header"),
        ("csv", "image,caption\na.png,x,y\n", "line 2 has 3 columns, not 2 as the header"),
        ("csv", 'image,caption\na.png,"x\ny"\nb.png,\n', "line 4: field 'caption' is empty"),
        ("csv", "image,caption\na.png,\"['x', 'y']\"\n", "line 2: field 'caption' .*a list written as one text"),
        ("csv", "image,caption,caption\na.png,x,y\n", 'line 1 names the column "caption" twice'),
        ("csv", 'image,caption\na.png,"x', "line 2 is not a row of a table"),
        ("jsonl", '{"image": "a.png", "caption": "x"}\n\n{"image": "b.png"}', "line 3 has no field 'caption'"),
        ("jsonl", "\n \n", "is empty"),
        ("json", "[]", "holds no records"),
        ("json", "{}", "holds no records"),
        ("json", '{"a": 1} {"a": 2}', r"line 1, column 10: Extra data\. .* one object per line is called \.jsonl"),
        ("json", '{"a": 1}\n{"a": ', r"line 2, column 7: Expecting value"),
        ("json", "[" * 100_000, "cannot be read .*recursion"),
        ("json", "[" + "9" * 5_000 + "]", "cannot be read .*digits"),
        ("json", '[{"image": "a.png", "caption": "x"}, null]', "record 1 is a NoneType"),
        ("json", '{"images": 5, "annotations": []}', "expected a list of records under 'images', found 5"),
    ],
)
def test_mistakes_in_files_are_named(folder: Path, kind: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"own\.{kind}.*{message}"):
        build(folder, content, kind=kind)


def test_a_folder_without_images_is_no_source(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is a folder; name"):
        cases.build("caption", "train", folder / "empty", folder)


# Ids


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("caption", "train"), ("caption", "val"), ("retrieval", "train"), ("retrieval", "val")),
        *(("coco_caption_instruct", "val"), ("msvd_caption", "val")),
    ],
)
def test_two_pictures_under_one_id_are_an_error(folder: Path, name: str, split: str) -> None:
    key = "video" if name == "msvd_caption" else "image"
    names = ("a.png", "b.png") if key == "image" else ("a.mp4", "b.mp4")
    rows = [{key: names[0], "caption": "x", "image_id": 1}, {key: names[1], "caption": "y", "image_id": 2}]
    same = {key: f"./{names[0]}", "caption": "z", "image_id": "1"}
    dataset = build(folder, [*rows, same], name=name, split=split)
    if split == "val":
        assert len(dataset) == 2
        assert dataset.annotation[0]["caption"] == ["x", "z"]
    else:
        assert [dataset[i]["image_id"] for i in range(3)] == [0, 1, 0]
    message = r"own\.json: record 0 \({}\) and .*own\.json: record 2 \({}\) are two pictures under one image_id '1'"
    with pytest.raises(InputError, match=message.format(*names)):
        build(folder, [*rows, {**same, key: names[1]}], name=name, split=split)


def test_ids_that_restart_in_the_second_file_are_an_error(folder: Path) -> None:
    first = cases.write(folder / "one.jsonl", [{"image": "a.png", "caption": "x", "image_id": 1}])
    second = cases.write(folder / "two.csv", [{"image": "b.png", "caption": "y", "image_id": 1}])
    info = {"annotations": {"val": {"storage": [str(first), str(second)]}}, "images": {"storage": str(folder)}}
    with pytest.raises(InputError, match=r"one\.jsonl: line 1 \(a\.png\) and .*two\.csv: line 2 \(b\.png\)"):
        registry.get_builder_class("retrieval")(build_info=info).build()


def test_instance_ids_and_question_ids_are_unique(folder: Path) -> None:
    rows = [{"image": "a.png", "question": "what?", "answer": "x", "instance_id": "one", "question_id": 1}] * 2
    with pytest.raises(InputError, match=r"own\.json: record 0 and .*record 1 have the same instance_id 'one'"):
        build(folder, rows, name="vqa")
    dialog = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}] * 2
    talks = [{"image": "a.png", "instance_id": 7, "conversations": dialog}]
    assert [r["instance_id"] for r in build(folder, talks, name="instruct").annotation] == ["7_0", "7_1"]


# What is written


def test_results_and_logs_are_written_whatever_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "caf\ud83d é 猫"
    path = write_json(tmp_path / "result" / "test_captions.json", [{"image_id": odd, "caption": "x"}])
    assert json.loads(path.read_text(encoding="utf-8")) == [{"image_id": odd, "caption": "x"}]
    assert "猫" in path.read_text(encoding="utf-8")
    log = JsonLog(tmp_path / "log.txt")
    log.write({"name": odd})
    assert json.loads((tmp_path / "log.txt").read_text(encoding="utf-8")) == {"name": odd}
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own keep texts that pytest-xdist cannot send
    monkeypatch.setattr("sys.stderr", io.StringIO())
    setup(tmp_path)
    logging.getLogger("lavis_lite").warning("read %s", odd)
    setup()
    assert r"read caf\ud83d é 猫" in (tmp_path / "console.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"image_id": 1, "caption": 5}], r"gold\.json \(annotations\): record 0: field 'caption' is 5, a number"),
        ([{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": ""}], "record 1: field 'caption' is empty"),
        ([{"image_id": [1], "caption": "x"}], "record 0: field 'image_id'"),
        ({"a": 1}, "expected a list of records"),
        ([5], "record 0 is a int"),
    ],
)
def test_references_of_a_file_are_checked(tmp_path: Path, annotations: Any, message: str) -> None:
    path = tmp_path / "gold.json"
    path.write_text(json.dumps({"annotations": annotations}))
    with pytest.raises(InputError, match=rf"run\.annotation_file: .*{message}"):
        CaptionTask(annotation_file=str(path)).references(None)


def test_values_are_shown_short_and_printable() -> None:
    assert shown("caf\ud83d") == r'"caf\ud83d"'
    assert len(shown("x" * 1000)) < 100
    assert (shown(None), shown(float("nan")), shown(True)) == ("null", "NaN", "true")


def test_tables_keep_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\n\nimage,caption\n\na.png,"two\nlines"\nb.png,x\n')
    assert [record["image"] for record in read_records(tmp_path / "a.csv")] == ["a.png", "b.png"]


def test_a_record_without_blanks_is_left_as_it_is() -> None:
    """The log counts the records that changed."""
    check = RecordCheck(required=("caption",), fields={"caption": TEXTS}, allow_blank=True)
    record = {"caption": ["a daisy", "a tulip"]}
    assert check.without_blank(record) is record
    assert check.without_blank({"caption": ["a daisy", " "]}) == {"caption": ["a daisy"]}
