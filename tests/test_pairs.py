"""Pairs with several captions per image: one drawn at each step, by the sample's seed; and records chosen by fields."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cli_helpers
import pytest

from lavis_lite.common.errors import InputError
from lavis_lite.common.rng import seed_sample
from lavis_lite.datasets.pairs import PairsBuilder
from lavis_lite.datasets.streams import StreamSettings

CAPTIONS = {"a": ["one", "two", "three"], "b": ["four"]}


def build(folder: Path, **settings: Any) -> Any:
    paths = dict(zip(CAPTIONS, cli_helpers.pictures(folder / "p", 2), strict=True))
    records = [
        {"image": paths[name], "caption": caption, "kept": caption != "two", "source": "web" if n == 0 else "synthetic"}
        for name, captions in CAPTIONS.items()
        for n, caption in enumerate(captions)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    file = {"storage": str(folder / "train.jsonl")}
    return PairsBuilder(build_info={"annotations": {"train": file, "val": file}}, **settings).build()


def drawn(dataset: Any, index: int, seed: int) -> str:
    seed_sample(seed)
    return dataset[index]["text_input"]


def test_one_caption_per_image_is_drawn_by_the_seed(tmp_path: Path) -> None:
    built = build(tmp_path, captions_per_sample="draw")
    assert {split: len(dataset) for split, dataset in built.items()} == {"train": 2, "val": 2}
    train = built["train"]
    texts = [drawn(train, 0, seed) for seed in range(300)]
    assert texts == [drawn(train, 0, seed) for seed in range(300)]
    counts = Counter(texts)
    assert counts.keys() == set(CAPTIONS["a"])
    assert all(70 <= count <= 130 for count in counts.values()), counts  # 100 +- 3.7 standard deviations of 8.2
    assert drawn(train, 1, 0) == "four"
    assert {drawn(built["val"], 0, seed) for seed in range(9)} == {"one"}


def test_all_captions_are_samples_by_default(tmp_path: Path) -> None:
    train = build(tmp_path)["train"]
    assert [train[i]["text_input"] for i in range(len(train))] == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        ({"kept": True}, ["one", "three", "four"]),
        ({"kept": [True, False], "source": "web"}, ["one", "four"]),
        ({"kept": False}, ["two"]),
    ],
)
def test_records_are_chosen_by_their_fields(where: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    train = build(tmp_path, where=where)["train"]
    assert [record["caption"] for record in train.annotation] == texts


def test_chosen_captions_are_drawn(tmp_path: Path) -> None:
    train = build(tmp_path, where={"kept": True}, captions_per_sample="draw")["train"]
    assert {drawn(train, 0, seed) for seed in range(40)} == {"one", "three"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"where": {"kind": 1}}, r"train\.jsonl: where\.kind.*image"),
        ({"where": {"source": "human"}}, r"train\.jsonl: where\.source.*human"),
        ({"captions_per_sample": "one"}, "captions_per_sample.*one"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        build(tmp_path, **settings)


def test_a_damaged_record_after_the_chosen_ones_is_named_with_its_line(tmp_path: Path) -> None:
    build(tmp_path)
    path = tmp_path / "train.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[2]) | {"caption": ""}
    path.write_text("\n".join([*lines[:2], json.dumps(record), lines[3]]))
    info = {"annotations": {"train": {"storage": str(path)}}}
    with pytest.raises(InputError, match=r"train\.jsonl: line 3"):
        PairsBuilder(build_info=info, where={"kept": True}).build()


def test_fields_choose_and_captions_are_drawn_in_tables_too(tmp_path: Path) -> None:
    """Tables are otherwise read row by row, where neither is possible."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = cli_helpers.pictures(tmp_path / "p", 2)
    columns = {"image": [paths[0]] * 3 + paths[1:], "caption": ["one", "two", "three", "four"]}
    table = arrow.table({**columns, "kept": [True, False, True, True]})
    parquet.write_table(table, tmp_path / "train.parquet")
    info: Any = {"annotations": {"train": {"storage": str(tmp_path / "train.parquet")}}}

    def texts(**settings: Any) -> list[str]:
        train: Any = PairsBuilder(build_info=info, **settings).build()["train"]
        return [train[i]["text_input"] for i in range(len(train))]

    assert texts() == ["one", "two", "three", "four"]
    assert texts(where={"kept": True}) == ["one", "three", "four"]
    first, second = texts(captions_per_sample="draw")
    assert first in ("one", "two", "three")
    assert second == "four"


@pytest.mark.parametrize("setting", [{"where": {"kept": True}}, {"captions_per_sample": "draw"}])
def test_a_stream_has_no_records_to_choose_from(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        PairsBuilder(stream=StreamSettings(epoch_length=8), **setting)
