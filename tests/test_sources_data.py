"""Sources of a split's records: tables, folders of images, saved data sets, the hub; splits that are cut off."""

import csv
import hashlib
import importlib.util
import json
import logging
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lavis_lite.cli.data.command import main
from lavis_lite.common.errors import (
    InputError,
    MissingFileError,
    MissingPackageError,
    UnreachableError,
    UnreadableSample,
)
from lavis_lite.common.records import ANSWERS, ID, INDEX, PATH, TEXTS, RecordCheck
from lavis_lite.common.records import WORDS as WORD_LIST
from lavis_lite.common.registry import registry
from lavis_lite.datasets import folders, hub
from lavis_lite.datasets.annotations import as_list, read_records
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.table_check import plain_rows
from lavis_lite.datasets.tables import TableImage, TableRecords

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")
pq = pytest.importorskip("pyarrow.parquet")

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (120, 120, 120)}
CAPTIONS = {"red": ["a red card", "red"], "green": ["a green card"], "blue": ["blue", "a card"], "grey": ["none"]}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one image per colour."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 3), colour).save(folder / f"{name}.png")
    return folder


def pixels(image: Image.Image) -> Any:
    return image.getpixel((0, 0))


def build(
    storage: Any, root: Path | None = None, *, layout: str = "pairs", split: str = "train", **keys: Any
) -> BaseDataset:
    info: dict[str, Any] = {"annotations": {"train" if "split_off" in keys else split: {"storage": storage}}}
    if root is not None:
        info["images"] = {"storage": str(root)}
    dataset = registry.get_builder_class(layout)(build_info=info, **keys).build([split])[split]
    dataset.vis_processor = pixels
    return dataset


def rows_of(root: Path, kind: str) -> list[dict[str, Any]]:
    """One row per colour; its image as a path, as bytes, or as `datasets` stores it."""
    rows = []
    for name, captions in CAPTIONS.items():
        content = (root / f"{name}.png").read_bytes()
        image: Any = {"path": f"{name}.png", "bytes": content, "struct": {"bytes": content, "path": f"{name}.png"}}[
            kind
        ]
        rows.append({"image": image, "caption": captions})
    return rows


def flat(captions: Mapping[str, Sequence[str]] = CAPTIONS) -> list[tuple[Any, str]]:
    return [(COLOURS[name], text) for name, texts in captions.items() for text in texts]


def seen(dataset: BaseDataset) -> list[tuple[Any, str]]:
    return [(dataset[i]["image"], dataset[i]["text_input"]) for i in range(len(dataset))]


# Tables


@pytest.mark.parametrize("kind", ["path", "bytes", "struct"])
@pytest.mark.parametrize("file", ["a.parquet", "a.arrow", "stream.arrow", "saved"])
def test_a_table_gives_the_samples_that_a_list_does(root: Path, tmp_path: Path, file: str, kind: str) -> None:
    table, path = pa.Table.from_pylist(rows_of(root, kind)), tmp_path / file
    if file == "a.parquet":
        pq.write_table(table, path)
    elif file == "a.arrow":
        feather.write_feather(table, path)
    elif file == "stream.arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(path)
    for layout in ("pairs", "caption"):
        dataset = build(str(path), root, layout=layout)
        assert seen(dataset) == flat()
        assert isinstance(dataset.annotation, TableRecords)
        assert [record["instance_id"] for record in dataset.annotation] == [str(i) for i in range(6)]
        assert [dataset[i]["instance_id"] for i in (0, 5)] == ["0", "5"]
    assert list(dataset.image_index) == [0, 0, 1, 2, 2, 3]
    dataset.keep_first(3)
    assert seen(dataset) == flat()[:3]
    evaluated = build(str(path), root, layout="caption", split="val")
    assert [dict(evaluated[i])["image"] for i in range(4)] == list(COLOURS.values())
    assert list(evaluated.references().values()) == list(CAPTIONS.values())


def test_bars_of_the_library_are_for_terminals(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, is_terminal in (("a", False), ("b", True)):
        pq.write_table(pa.table({"image": ["red.png"], "caption": [name]}), tmp_path / f"{name}.parquet")
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)
        build(str(tmp_path / f"{name}.parquet"), root)
        assert ("Generating" in capsys.readouterr().err) == is_terminal
    assert not datasets.are_progress_bars_disabled()


def test_workers_and_copies_read_the_same_table(root: Path, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows_of(root, "bytes")), tmp_path / "a.parquet")
    dataset = build(str(tmp_path / "a.parquet"))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [(tuple(sample["image"]), sample["text_input"]) for sample in loader] == flat()
    copied = pickle.loads(pickle.dumps(dataset.annotation))
    assert [record["caption"] for record in copied] == [text for _, text in flat()]
    assert len(pickle.dumps(dataset.annotation)) < 20_000


def test_a_table_of_labels_is_classification_data(root: Path, tmp_path: Path) -> None:
    rows = [{"picture": row["image"], "kind": number % 2} for number, row in enumerate(rows_of(root, "struct"))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = {"image": "picture", "label": "kind"}
    dataset = build(str(tmp_path / "a.parquet"), layout="classification", columns=columns)
    assert list(dataset.labels) == [0, 1, 0, 1]
    assert [(dataset[i]["image"], dataset[i]["label"]) for i in range(4)] == [
        (colour, number % 2) for number, colour in enumerate(COLOURS.values())
    ]
    with pytest.raises(InputError, match=r"a\.parquet.*'pictures'.*'picture'"):
        build(str(tmp_path / "a.parquet"), layout="classification", columns=columns | {"image": "pictures"})
    rows[2]["kind"] = 7
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: row 2 has label '7'"):
        build(str(tmp_path / "b.parquet"), layout="classification", columns=columns, classes=["0", "1"])


def test_questions_of_a_table_with_images(root: Path, tmp_path: Path) -> None:
    rows = [{"image": row["image"], "question": "what?", "answer": ["card", "x"]} for row in rows_of(root, "struct")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    dataset = build(str(tmp_path / "a.parquet"), layout="vqa")
    assert [dataset[i]["image"] for i in range(4)] == list(COLOURS.values())
    assert dataset[1]["answer"] == ["card", "x"]


def test_several_tables_and_patterns(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root, "path")
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(rows[2 * number : 2 * number + 2]), tmp_path / f"part-{number}.parquet")
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert seen(build(str(tmp_path / "part-*.parquet"), root)) == flat()
    both = [str(tmp_path / "part-1.parquet"), str(tmp_path / "more.jsonl")]
    assert seen(build(both, root)) == flat({name: CAPTIONS[name] for name in ("blue", "grey")}) + flat()
    with pytest.raises(MissingFileError, match=r"annotations\.train: .*shard-\*\.parquet"):
        build(str(tmp_path / "shard-*.parquet"), root)


@pytest.mark.parametrize("storage", ["a.parquet", "hf://someone/cards"])
def test_a_missing_package_is_named(
    root: Path, tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, root)
    path.write_text(path.read_text().replace(f"{tmp_path}/a.parquet", storage))
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install lavis-lite\[data\]"):
        build(storage)
    code, out = run_data(capsys, "status", path)
    assert code == 1
    assert "pip install lavis-lite[data]" in out


# What is wrong in tables


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_images_that_are_null_are_counted(root: Path, tmp_path: Path, kind: str) -> None:
    rows = rows_of(root, kind)
    for number in (1, 3):
        rows[number]["image"] = None if kind == "bytes" else {"bytes": None, "path": None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: column 'image'.* 2 of 4 rows, first in row 1"):
        build(str(tmp_path / "a.parquet"))


def test_tables_with_other_types_or_columns_are_named(root: Path, tmp_path: Path) -> None:
    rows = [{"image": f"{name}.png", "caption": name} for name in COLOURS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"image": "x.png", "caption": {"text": "x"}}]), tmp_path / "b.parquet")
    both = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    with pytest.raises(InputError, match=r"column 'caption' is string in .*a\.parquet, and struct<.*b\.parquet"):
        build(both, root)
    pq.write_table(pa.Table.from_pylist([{"image": "x.png"}]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: row 0: field 'caption' is null"):
        build(both, root)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"b\.parquet"):
        build(both, root)
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.xlsx.*'\.xlsx'"):
        build(str(tmp_path / "a.xlsx"), root)


def test_a_wrong_record_of_a_table_is_named_by_its_row(root: Path, tmp_path: Path, caplog: Any) -> None:
    rows = rows_of(root, "bytes")
    rows[2]["caption"] = ["fine", " "]
    rows[3]["caption"] = [""]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: row 2: field 'caption'.*item 1"):
        build(str(tmp_path / "a.parquet"))
    dataset = build(str(tmp_path / "a.parquet"), blank_texts="skip")
    assert [text for _, text in seen(dataset)] == ["a red card", "red", "a green card", "fine"]
    assert dataset.num_blank == 2
    assert "2 of 4" in caplog.text
    ids = [{"image": f"{name}.png", "caption": "x", "image_id": number // 2} for number, name in enumerate(COLOURS)]
    pq.write_table(pa.Table.from_pylist(ids), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"row 1 \(green\.png\) .*row 0 \(red\.png\)|row 0 \(red.*row 1 \(green"):
        build(str(tmp_path / "b.parquet"), root, layout="caption")
    twice = [{"image": f"{name}.png", "caption": "x", "instance_id": name[0]} for name in COLOURS]
    pq.write_table(pa.Table.from_pylist(twice), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"row 1 and .*row 3 have the same instance_id 'g'"):
        build(str(tmp_path / "c.parquet"), root)


def test_a_damaged_image_of_a_table_is_an_unreadable_sample(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root, "bytes")
    rows[1]["image"] = rows[1]["image"][:40]
    rows[2]["image"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    dataset = build(str(tmp_path / "a.parquet"))
    assert dataset[0]["image"] == COLOURS["red"]
    for number, row in ((2, 1), (3, 2)):
        with pytest.raises(UnreadableSample, match=rf"a\.parquet: row {row}, column 'image'"):
            dataset[number]


def test_saved_splits_are_chosen_by_name(root: Path, tmp_path: Path) -> None:
    table = datasets.Dataset(pa.Table.from_pylist(rows_of(root, "struct")))
    datasets.DatasetDict({"train": table, "val": table.select(range(1))}).save_to_disk(tmp_path / "saved")
    assert seen(build(str(tmp_path / "saved"))) == flat()
    assert len(build(str(tmp_path / "saved"), split="val")) == 2
    with pytest.raises(InputError, match=r"saved: has no split 'test'.*train, val"):
        build(str(tmp_path / "saved"), split="test")
    assert len(build(str(tmp_path / "saved" / "val"), split="test")) == 2


WORDS = ["a card", "a card", "red", "red", "_x", "9", "", " ", "..!", "['x', 'y']", "ünï", "中文", None, "a\0b", "x é"]
LISTS = [*([word] for word in WORDS), [], ["a", " "], ["a", "b"], ["c"], None]


def test_a_row_that_is_taken_for_valid_is(tmp_path: Path) -> None:
    """The check by columns against that by records, on fields of all kinds."""
    rng = np.random.default_rng(0)
    kinds = {"image": PATH, "caption": TEXTS, "answer": ANSWERS, "words": WORD_LIST, "image_id": ID, "label": INDEX}
    num_plain = 0
    for clean, allow_blank in ((str, False), (str, True), (lambda text: text.strip(".!"), False)):
        check = RecordCheck(required=("image|label", "caption"), fields=kinds, clean=clean, allow_blank=allow_blank)
        for values in (WORDS, LISTS, [1, -3, None], [0.5, 2.0]):
            for name in kinds:
                columns = {other: [WORDS[i] for i in rng.integers(0, 6, 60)] for other in kinds}
                columns |= {"label": [1, None] * 30, name: [values[i] for i in rng.integers(0, len(values), 60)]}
                table = pa.table(columns)
                arrays = {column: table[column].combine_chunks() for column in kinds}
                plain = plain_rows(arrays, set(), check, 60)
                problems = [check.problem(record) for record in table.to_pylist()]
                assert [
                    problem for problem, is_plain in zip(problems, plain, strict=True) if is_plain and problem
                ] == []
                num_plain += plain.sum()
    assert num_plain > 1000


# Text tables


@pytest.mark.parametrize(
    "content",
    [
        "image;caption\nred.png;x, y\n",
        "image\tcaption\nred.png\tx, y\n",
        "image|caption\nred.png|x, y\n",
        'image,caption\nred.png,"x, y"\n',
        '\ufeffimage;caption\nred.png;"x, y"\n',
        '"image";"caption"\n"red.png";"x, y"\n',
    ],
)
def test_the_delimiter_of_a_csv_is_found(root: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    assert seen(build(str(tmp_path / "a.csv"), root)) == [(COLOURS["red"], "x, y")]


# Folders of images


def test_a_folder_with_text_files_is_caption_data(root: Path) -> None:
    for name, captions in CAPTIONS.items():
        (root / f"{name}.txt").write_text(captions[0])
    expected = [(COLOURS[name], CAPTIONS[name][0]) for name in sorted(COLOURS)]
    assert seen(build(str(root))) == expected
    (root / "grey.txt").unlink()
    with pytest.raises(InputError, match=r"grey\.png has no field 'caption'"):
        build(str(root))
    (root / "grey.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"grey\.txt.*UTF-8"):
        build(str(root))


def test_names_and_folders_are_labels(root: Path, tmp_path: Path) -> None:
    dataset = build(str(root), layout="classification", columns={"label": "name"}, classes=list(COLOURS))
    assert [(dataset[i]["image"], dataset[i]["label"]) for i in range(4)] == [
        (COLOURS[name], list(COLOURS).index(name)) for name in sorted(COLOURS)
    ]
    assert [text for _, text in seen(build(str(root), columns={"caption": "name"}))] == sorted(COLOURS)
    sorted_root = tmp_path / "sorted"
    for name in COLOURS:
        (sorted_root / name).mkdir(parents=True)
        (root / f"{name}.png").rename(sorted_root / name / "1.png")
    dataset = build(str(sorted_root), layout="classification")
    assert dataset.classes == sorted(COLOURS)
    assert [(dataset[i]["image"], dataset[i]["label"]) for i in range(4)] == [
        (COLOURS[name], number) for number, name in enumerate(sorted(COLOURS))
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_s_metadata_file_is_read(root: Path, kind: str) -> None:
    rows = [{"file_name": f"{name}.png", "text": captions[0]} for name, captions in CAPTIONS.items()]
    path = root / f"metadata.{kind}"
    if kind == "csv":
        path.write_text("file_name,text\n" + "".join(f"{row['file_name']},{row['text']}\n" for row in rows))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    expected = [(COLOURS[name], captions[0]) for name, captions in CAPTIONS.items()]
    assert seen(build(str(root), columns={"caption": "text"})) == expected


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is a folder; name an annotation file"):
        build(str(tmp_path / "empty"))


def test_links_in_a_circle_are_named(root: Path) -> None:
    (root / "again").symlink_to(root)
    with pytest.raises(InputError, match=r"images: cannot be listed"):
        folders.list_files(root)


def test_a_folder_is_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = 1_000_000_000
    os.utime(root, (old, old))
    assert folders.list_files(root) == sorted(f"{name}.png" for name in COLOURS)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lambda path: pytest.fail(f"{path} is listed again"))
        assert len(folders.list_files(root)) == 4
    (root / "new.png").write_bytes(b"")
    assert len(folders.list_files(root)) == 5
    (root / "new.png").unlink()
    assert len(folders.list_files(root)) == 4  # just changed, so the list above was not kept


def test_named_labels_of_a_table_are_classes(root: Path, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    rows = {"image": [str(root / f"{name}.png") for name in COLOURS], "label": [1, 0, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    dataset = build(str(tmp_path / "saved"), layout="classification")
    assert dataset.classes == ["dark", "light"]
    assert [(dataset[i]["image"], dataset[i]["label"]) for i in range(4)] == list(
        zip(COLOURS.values(), rows["label"], strict=True)
    )
    other = build(str(tmp_path / "saved"), layout="classification", classes=["light", "dark"])
    assert list(other.labels) == [0, 1, 1, 0]


# The hub


def cached_on_hub(root: Path, tmp_path: Path) -> None:
    """Put a data set into the cache, as `datasets` does after a download."""
    folder = tmp_path / "hf" / "someone___cards" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    saved = datasets.Dataset(pa.Table.from_pylist(rows_of(root, "struct")))
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "cards-train.arrow"), features=saved.features) as writer:
        writer.write_table(saved.data.table)
        writer.finalize()
    info = saved.info.copy()
    info.config_name, info.dataset_name, info.version = "default", "cards", datasets.Version("0.0.0")
    info.builder_name = "parquet"
    info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_bytes=1, num_examples=4)})
    info.write_to_directory(str(folder))


def test_a_cached_data_set_of_the_hub_is_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_on_hub(root, tmp_path)
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    dataset = build("hf://someone/cards")
    assert seen(dataset) == flat()
    assert isinstance(dataset.annotation, TableRecords)
    assert len(build("hf://someone/cards:train", split="val")) == 6
    with pytest.raises((InputError, MissingFileError), match=r"annotations\.val\.storage.*cards:val"):
        build("hf://someone/cards", split="val")


def test_slices_and_revisions_of_the_hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_on_hub(root, tmp_path)
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    whole, first = flat(), len(CAPTIONS["red"])
    for part, expected in {"[:1]": whole[:first], "[25%:]": whole[first:], "[1:2]": [whole[first]]}.items():
        assert seen(build(f"hf://someone/cards:train{part}")) == expected
    assert seen(build("hf://someone/cards:train[:1]")) == whole[:first]
    assert len(list((tmp_path / "cache/tables").glob("slice-*"))) == 3
    refs = tmp_path / "hub/datasets--someone--cards/refs"
    refs.mkdir(parents=True)
    (refs / "v1").write_text("abc")
    (refs / "v2").write_text("def")
    assert seen(build("hf://someone/cards@v1:train[1:]")) == whole[first:]
    for revision in ("v2", "main", "0" * 40):
        with pytest.raises(MissingFileError, match=f"@{revision}:train.*revision='{revision}'"):
            build(f"hf://someone/cards@{revision}")
    assert hub.parse("hf://a/b@refs%2Fpr%2F1/c:val[:5]", "train", where="").revision == "refs/pr/1"
    for wrong in ("hf://a/b:train[:5", "hf://a/b:train[5]", "hf://a/b@:train"):
        with pytest.raises(InputError, match=r"annotations\.train\.storage"):
            build(wrong)


@pytest.mark.parametrize("offline", [True, False])
def test_a_data_set_of_the_hub_without_network(offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if offline:
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        (MissingFileError, UnreachableError), match=r"annotations\.train\.storage.*nobody/x.*/hf"
    ) as caught:
        build("hf://nobody/x")
    assert "load_dataset('nobody/x', split='train')" in str(caught.value)
    with pytest.raises(InputError, match=r"annotations\.train\.storage.*'hf://a/b/c/d'"):
        build("hf://a/b/c/d")


# Splits


def many(tmp_path: Path, count: int = 400) -> Path:
    rows = [{"image": f"{number // 2}.png", "caption": f"text {number}"} for number in range(count)]
    np.random.default_rng(0).shuffle(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path / "a.parquet")
    return tmp_path / "a.json"


def test_a_split_is_cut_off_by_image(tmp_path: Path) -> None:
    path = many(tmp_path)

    def parts(file: Path, **shares: float) -> dict[str, set[str]]:
        found = {}
        for split in ("train", *shares):
            dataset = build(str(file), tmp_path, split=split, split_off=shares)
            assert len(dataset) == 2 * len({record["image"] for record in dataset.annotation})
            found[split] = {record["image"] for record in dataset.annotation}
        return found

    both = parts(path, val=0.1, test=0.2)
    assert sum(map(len, both.values())) == 200
    assert set().union(*both.values()) == {f"{number}.png" for number in range(200)}
    assert 10 <= len(both["val"]) <= 32
    assert 25 <= len(both["test"]) <= 58
    assert parts(tmp_path / "a.parquet", val=0.1, test=0.2) == both
    alone = parts(path, val=0.1)
    assert alone["val"] == both["val"]


@pytest.mark.parametrize("metadata", [False, True])
def test_folders_are_cut_alike_wherever_they_are(tmp_path: Path, metadata: bool) -> None:
    def parts(place: str) -> dict[str, set[str]]:
        folders = [tmp_path / place / name for name in ("garden", "street")]
        for folder in folders:
            folder.mkdir(parents=True)
            for number in range(40):
                (folder / f"{number}.png").touch()
                (folder / f"{number}.txt").write_text(f"{folder.name} {number}")
            rows = [{"file_name": f"{number}.png", "caption": f"{folder.name} {number}"} for number in range(40)]
            if metadata:
                (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        info = {"annotations": {"train": {"storage": list(map(str, folders))}}}
        builder = registry.get_builder_class("caption")(build_info=info, split_off={"val": 0.25})
        return {split: {str(r["caption"]) for r in one.annotation} for split, one in builder.build().items()}

    first = parts("here")
    assert parts("elsewhere") == first
    assert 8 <= len(first["val"]) <= 32
    assert len(first["train"]) + len(first["val"]) == 80


def test_images_of_a_table_are_read_once_to_cut_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": f"content {n // 2}".encode(), "caption": f"{n // 2}"} for n in range(80)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    opened, read = [], TableImage.read

    def counted(self: TableImage) -> bytes:
        opened.append(self.row)
        return read(self)

    monkeypatch.setattr(TableImage, "read", counted)
    for layout in ("caption", "pairs"):  # of the former, only training reads tables row by row
        parts = {}
        for split in ("train", "val"):
            dataset = build(str(tmp_path / "a.parquet"), layout=layout, split=split, split_off={"val": 0.3})
            parts[split] = {str(caption) for r in dataset.annotation for caption in as_list(r["caption"])}
        hashes = {str(n): hashlib.blake2b(f"content {n}".encode(), digest_size=8).digest() for n in range(40)}
        numbers = {n: int.from_bytes(value, "big") / 2**64 for n, value in hashes.items()}
        assert parts["val"] == {n for n, number in numbers.items() if number >= 0.7}
        assert parts["train"] == {n for n, number in numbers.items() if number < 0.7}
    assert sorted(opened) == list(range(80))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"val": 0}, r"split_off\.val.*0"),
        ({"val": 0.5, "test": 0.5}, r"split_off: .*1"),
        ({"train": 0.5}, r"split_off\.train"),
    ],
)
def test_shares_that_cannot_be_cut(tmp_path: Path, shares: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(str(many(tmp_path)), tmp_path, split_off=shares)


def test_a_split_is_cut_off_only_where_it_can_be(tmp_path: Path) -> None:
    path = str(many(tmp_path))
    for files, message in (
        ({"train": {"storage": path}, "val": {"storage": path}}, r"split_off\.val: .*annotations"),
        ({"test": {"storage": path}}, r"split_off: .*'train'"),
    ):
        builder = registry.get_builder_class("pairs")(build_info={"annotations": files}, split_off={"val": 0.1})
        with pytest.raises(InputError, match=message):
            builder.build()
    shapes = registry.get_builder_class("shapes_caption")(split_off={"val": 0.1})
    with pytest.raises(InputError, match=r"split_off"):
        shapes.build(["train"])


def test_images_in_two_splits_are_counted(root: Path, tmp_path: Path, caplog: Any) -> None:
    rows = rows_of(root, "path")
    for name, part in {"train": rows[:3], "val": rows[2:]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    info = {
        "annotations": {name: {"storage": str(tmp_path / f"{name}.json")} for name in ("train", "val")},
        "images": {"storage": str(root)},
    }
    builder = registry.get_builder_class("caption")(build_info=info)
    with caplog.at_level(logging.WARNING):
        builder.build()
    assert "val: 1 of its images" in caplog.text


def test_a_split_has_an_image_folder_of_its_own(root: Path, tmp_path: Path) -> None:
    rows = rows_of(root, "path")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    info = {
        "annotations": {"train": {"storage": str(tmp_path / "a.json"), "images": str(root)}},
        "images": {"storage": str(tmp_path / "nowhere")},
    }
    dataset = registry.get_builder_class("pairs")(build_info=info).build(["train"])["train"]
    dataset.vis_processor = pixels
    assert seen(dataset) == flat()
    info["annotations"]["train"]["images"] = str(tmp_path / "gone")
    with pytest.raises(MissingFileError, match=r"image folder not found: .*gone"):
        registry.get_builder_class("pairs")(build_info=info).build(["train"])


# The commands


def recipe(tmp_path: Path, root: Path) -> Path:
    """A recipe with two sources: a table with images, of which a split is cut off, and a folder."""
    rows = [{"image": (root / f"{name}.png").read_bytes(), "caption": name, "image_id": name} for name in COLOURS]
    pq.write_table(pa.Table.from_pylist(rows * 5), tmp_path / "a.parquet")
    for name in COLOURS:
        (root / f"{name}.txt").write_text(name)
    path = tmp_path / "own.yaml"
    path.write_text(f"""
model: {{arch: blip_caption, model_type: tiny}}
datasets:
  cards:
    layout: caption
    split_off: {{val: 0.5}}
    build_info: {{annotations: {{train: {{storage: {tmp_path}/a.parquet}}}}}}
  folder:
    layout: caption
    build_info: {{annotations: {{train: {{storage: {root}}}}}}}
run: {{task: captioning, train_splits: [train], valid_splits: [val], output_dir: {tmp_path}/out, max_epoch: 1,
  batch_size_train: 2, batch_size_eval: 2, report_metric: false, train_dataset_sampling: sqrt, num_workers: 0}}
""")
    return path


def run_data(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, argv)))
    return ended.value.code, "".join(capsys.readouterr())


def test_the_data_commands_know_all_sources(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, root)
    code, out = run_data(capsys, "status", path)
    assert code == 0, out
    assert str(tmp_path / "a.parquet") in out
    code, out = run_data(capsys, "check", path, "--decode", "all")
    assert code == 0, out
    assert "4 images, all there" in out
    sizes = [int(line.split()[0]) for line in out.splitlines() if line.endswith("samples with images in the table")]
    assert sum(sizes[:1]) % 5 == 0
    assert run_data(capsys, "preview", path, "--out", tmp_path / "sheet.png", "-n", 3)[0] == 0
    assert Image.open(tmp_path / "sheet.png").width > 300
    pq.write_table(pa.Table.from_pylist([{"image": b"broken", "caption": "x"}]), tmp_path / "a.parquet")
    path.write_text(path.read_text().replace("    split_off: {val: 0.5}\n", ""))
    code, out = run_data(capsys, "check", path, "--decode", "all")
    assert code == 1
    assert "1 of 1 images cannot be decoded" in out
    assert "a.parquet: row 0" in out
    path.write_text(path.read_text().replace("a.parquet", "b-*.parquet"))
    code, out = run_data(capsys, "status", path)
    assert code == 1
    assert "MISSING" in out
    assert "b-*.parquet" in out


@pytest.mark.slow
def test_a_run_trains_on_all_sources(tmp_path: Path, root: Path) -> None:
    assert cli_helpers.train(recipe(tmp_path, root), "run.valid_splits=[]") == 0


# What other programs write


def test_a_csv_s_lines_end_at_line_feeds_only(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\nred.png,one\u2028two\ngreen.png,a\x0cb\nblue.png,\n", "utf-8")
    with pytest.raises(InputError, match=r"a\.csv: line 4: field 'caption' is empty"):
        build(str(tmp_path / "a.csv"), root)
    dataset = build(str(tmp_path / "a.csv"), root, blank_texts="skip")
    assert [text for _, text in seen(dataset)] == ["one\u2028two", "a\x0cb"]


def header_of(name: str) -> str:
    return "image\tcaption\n" if name.endswith("tsv") else "image,caption\n"


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("a.tsv", 'a.jpg\t"big dog\nb.jpg\tcat\nc.jpg\tend"\n', ['"big dog', "cat", 'end"']),
        ("a.tsv", 'a.jpg\t"Big" dog\nb.jpg\t"a ""whole"" cell"\r\n', ['"Big" dog', 'a "whole" cell']),
        ("a.tsv", 'a.jpg\t"two\nlines\tin\none"\nb.jpg\tx\n', ["two\nlines\tin\none", "x"]),
        ("a.csv", 'a.jpg,"two\nlines, here\nof a cell"\nb.jpg,x\n', ["two\nlines, here\nof a cell", "x"]),
        ("a.csv", f'a.jpg,{"x" * 200_000}\nb.jpg,"{"y," * 100_000}"\n', ["x" * 200_000, "y," * 100_000]),
    ],
)
def test_quotation_marks_and_long_cells(tmp_path: Path, name: str, content: str, captions: list[str]) -> None:
    limit = csv.field_size_limit()
    (tmp_path / name).write_text(header_of(name) + content, newline="")
    assert [record["caption"] for record in read_records(tmp_path / name)] == captions
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.csv", 'x.jpg,y\na.jpg,"big dog\nb.jpg,cat\nc.jpg,end"\n', ("line 3", "line 5", "line 4")),
        ("a.csv", 'x.jpg,y\na.jpg,"big dog\nb.jpg,cat\n', ("line 3",)),
        ("a.csv", 'x.jpg,y\na.jpg,"Big" dog\n', ("line 3",)),
        ("a.tsv", 'x.jpg\ty\na.jpg\t"big dog\nb.jpg\tcat\nc.jpg\tend"\nd.jpg\n', ("line 3", "line 5", "line 4")),
    ],
)
def test_a_quotation_mark_that_joins_rows_is_named(
    tmp_path: Path, name: str, content: str, lines: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(header_of(name) + content)
    with pytest.raises(InputError) as caught:
        read_records(tmp_path / name)
    assert all(word in str(caught.value) for word in (*lines, name)), caught.value


def test_lists_of_a_fixed_length_are_captions(root: Path, tmp_path: Path) -> None:
    captions = pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2))
    pq.write_table(pa.table({"image": ["red.png", "blue.png"], "caption": captions}), tmp_path / "a.parquet")
    dataset = build(str(tmp_path / "a.parquet"), root, layout="caption")
    assert seen(dataset) == [(COLOURS["red"], t) for t in "ab"] + [(COLOURS["blue"], t) for t in "cd"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_columns_of_bytes_that_are_not_read_may_be_null(root: Path, tmp_path: Path, split: str) -> None:
    sounds = [{"bytes": None, "path": None}, {"bytes": b"x", "path": "x.wav"}]
    columns = {"img": ["red.png", "blue.png"], "caption": ["a", "b"], "thumb": [None, b"x"], "audio": sounds}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    dataset = build(str(tmp_path / "a.parquet"), root, layout="caption", columns={"image": "img"}, split=split)
    assert [dataset[i]["image"] for i in range(2)] == [COLOURS["red"], COLOURS["blue"]]
    columns["img"] = [None, (root / "red.png").read_bytes()]
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: column 'img'.* 1 of 2 rows, first in row 0"):
        build(str(tmp_path / "b.parquet"), root, layout="caption", columns={"image": "img"}, split=split)


def test_texts_are_not_made_of_another_table_s_numbers(root: Path, tmp_path: Path) -> None:
    for name, caption in {"a": "x", "b": 3}.items():
        pq.write_table(pa.table({"image": ["red.png"], "caption": [caption]}), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"'caption' is string in .*a\.parquet, and int64 in .*b\.parquet"):
        build([str(tmp_path / f"{name}.parquet") for name in "ab"], root)
    pq.write_table(
        pa.table({"image": ["red.png"], "caption": pa.array(["y"], pa.large_string())}), tmp_path / "b.parquet"
    )
    assert len(build([str(tmp_path / f"{name}.parquet") for name in "ab"], root)) == 2


def test_tables_without_rows_are_left_out(root: Path, tmp_path: Path) -> None:
    rows = pa.table({"image": ["red.png"], "caption": ["x"]})
    for name, table in {"a": rows, "b": rows[:0], "c": rows}.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert len(build(str(tmp_path / "*.parquet"), root)) == 2
    with pytest.raises(InputError, match=r"b\.parquet: holds no records"):
        build(str(tmp_path / "b.parquet"), root)


def test_classes_of_tables_have_the_order_of_the_training_split(root: Path, tmp_path: Path) -> None:
    annotations = {}
    for split, names in {"train": ["cold", "warm"], "val": ["warm", "cold"]}.items():
        features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        rows = {"image": ["red.png", "blue.png"], "label": [names.index("warm"), names.index("cold")]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / split)
        annotations[split] = {"storage": str(tmp_path / split)}
    info = {"annotations": annotations, "images": {"storage": str(root)}}
    builder = registry.get_builder_class("classification")(build_info=info)
    for split in ("train", "val"):
        dataset = builder.build([split])[split]
        assert [dataset.classes, list(dataset.labels)] == [["cold", "warm"], [1, 0]]
