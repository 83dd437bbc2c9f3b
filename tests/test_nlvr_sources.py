"""Pairs of images, as the layout `nlvr` has them, from shards, tables and streams of both."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import shard_helpers
import torch
from PIL import Image

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.nlvr import NLVREvalDataset
from lavis_lite.datasets.streams import Part, StreamDataset

datasets = pytest.importorskip("datasets")

COUNT = 6


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def number_of(image: Image.Image) -> torch.Tensor:
    """The number that a picture of `shard_helpers` shows."""
    return torch.tensor(float(image.getpixel((0, 0))[0]))  # type: ignore[index]


def shards(folder: Path) -> tuple[str, dict[str, str]]:
    samples = [
        {
            "__key__": f"{n:03d}",
            "left.png": shard_helpers.png(n),
            "right.png": shard_helpers.png(100 + n),
            "txt": f"the left one is number {n}",
            "cls": str(n % 2),
        }
        for n in range(COUNT)
    ]
    path = shard_helpers.write_shard(folder / "train.tar", samples)
    return str(path), {"image0": "left.png", "image1": "right.png", "sentence": "caption"}


def two_columns(folder: Path) -> tuple[str, dict[str, str]]:
    rows = {
        "left": [{"bytes": shard_helpers.png(n), "path": None} for n in range(COUNT)],
        "right": [{"bytes": shard_helpers.png(100 + n), "path": None} for n in range(COUNT)],
        "text": [f"the left one is number {n}" for n in range(COUNT)],
        "label": [n % 2 for n in range(COUNT)],
    }
    kinds = {"left": datasets.Image(), "right": datasets.Image(), "text": datasets.Value("string")}
    kinds["label"] = datasets.ClassLabel(names=["False", "True"])
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(str(folder / "train.parquet"))
    return str(folder / "train.parquet"), {"image0": "left", "image1": "right", "sentence": "text"}


def a_list(folder: Path) -> tuple[str, dict[str, str]]:
    pairs = [[{"bytes": shard_helpers.png(first + n), "path": None} for first in (0, 100)] for n in range(COUNT)]
    texts = [f"the left one is number {n}" for n in range(COUNT)]
    rows = {"images": pairs, "sentence": texts, "label": [str(n % 2 == 1) for n in range(COUNT)]}
    kinds = {
        "images": datasets.List(datasets.Image()),
        **dict.fromkeys(("sentence", "label"), datasets.Value("string")),
    }
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(str(folder / "train.parquet"))
    return str(folder / "train.parquet"), {}


def build(storage: str, columns: dict[str, str], split: str = "train", **more: Any) -> Any:
    info = {"annotations": {split: {"storage": storage}}}
    dataset = registry.get_builder_class("nlvr")(build_info=info, columns=columns, **more).build()[split]
    blocks = dataset.make_block.make if isinstance(dataset, StreamDataset) else None
    assert blocks is not None or isinstance(dataset, NLVREvalDataset)
    return dataset


def check(sample: dict[str, Any]) -> int:
    """The pair fits the statement, and the label; swapped pairs have the words swapped."""
    images = {"left": number_of(sample["image0"]).item(), "right": number_of(sample["image1"]).item()}
    words = sample["text_input"].split()
    number = int(words[-1])
    assert images[words[1]] == number
    assert sorted(images.values()) == [number, 100 + number]
    assert sample["label"] == number % 2
    return number


@pytest.mark.parametrize("make", [shards, two_columns, a_list])
def test_pairs_are_streamed(tmp_path: Path, make: Any) -> None:
    storage, columns = make(tmp_path)
    dataset = build(storage, columns, stream={"epoch_length": COUNT, "shuffle_buffer": 4})
    items = [item.read() for item in islice(dataset.items(Part(0, 1), seed=0), 2 * COUNT)]
    assert sorted(map(check, items)) == sorted([*range(COUNT)] * 2)
    assert {sample["text_input"].split()[1] for sample in items} == {"left", "right"}


@pytest.mark.parametrize("make", [shards, two_columns])
@pytest.mark.parametrize("split", ["train", "val"])
def test_pairs_are_read_with_an_index(tmp_path: Path, make: Any, split: str) -> None:
    storage, columns = make(tmp_path)
    dataset = build(storage, columns, split)
    assert [check(dataset[n]) for n in range(len(dataset))] == [*range(COUNT)]


def test_one_image_of_two_is_named(tmp_path: Path) -> None:
    storage, columns = shards(tmp_path)
    without = {key: value for key, value in columns.items() if key != "image1"}
    for more in ({}, {"stream": {"epoch_length": COUNT}}):
        with pytest.raises(InputError, match=r"train\.tar.*no field 'image1'"):
            build(storage, without, **more)
        with pytest.raises(InputError, match=r"train\.tar.*'images' or 'image0'"):
            build(storage, {"sentence": "caption"}, **more)
        with pytest.raises(InputError, match=r"train\.tar: columns\.image1: .*'rigth\.png'.*'right\.png'"):
            build(storage, {**columns, "image1": "rigth.png"}, **more)
