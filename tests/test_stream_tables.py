"""Streams of rows by the library `datasets`: parts, resume, images beside and inside the rows, and what is wrong."""

import json
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import shard_helpers
import yaml

from lavis_lite.cli.data.command import main
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import InputError, MissingFileError, UnreachableError
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import reach
from lavis_lite.datasets import streams
from lavis_lite.datasets.streams import Item, Part, StreamDataset
from lavis_lite.runners.loaders import TrainLoader

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIZES = (6, 5, 7)
EYE = {"name": "blip_image_eval", "image_size": 16}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set as the hub stores it: three parquet files with images inside."""
    files, first = tmp_path / "cards/data", 0
    files.mkdir(parents=True)
    for number, size in enumerate(SIZES):
        texts = [f"picture number {n}" for n in range(first, first + size)]
        images = [{"bytes": shard_helpers.png(n), "path": None} for n in range(first, first + size)]
        rows = {"image": images, "text": texts, "kind": [n % 2 for n in range(size)]}
        kinds = {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=list("ab")),
        }
        datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(str(files / f"train-{number}.parquet"))
        first += size
    return tmp_path / "cards"


def stream(storage: Any, layout: str = "pairs", **more: Any) -> StreamDataset:
    given = {"columns": {"caption": "text"}, "stream": {"epoch_length": 18, "shuffle_buffer": 1}, **more}
    info = {"annotations": {"train": {"storage": storage}}}
    builder = registry.get_builder_class(layout)(build_info=info, vis_processor={"train": EYE}, **given)
    dataset = builder.build()["train"]
    assert isinstance(dataset, StreamDataset)
    return dataset


def texts(items: Sequence[Item]) -> list[str]:
    return [item.read()["text_input"] for item in items]


@pytest.mark.parametrize("storage", ["", "data/*.parquet"])
@pytest.mark.parametrize("resampled", [False, True])
def test_a_stream_continues_at_any_row(folder: Path, storage: str, resampled: bool) -> None:
    settings = {"epoch_length": 18, "shuffle_buffer": 4, "resampled": resampled}
    dataset = stream(str(folder / storage), stream=settings)
    assert len(dataset.shards) == 3
    whole = list(islice(dataset.items(Part(0, 1), seed=3), 40))
    for at in (0, 3, 4, 17, 30):
        rest = islice(dataset.items(Part(0, 1), seed=3, start=whole[at].position), 39 - at)
        assert texts(list(rest)) == texts(whole[at + 1 :])


def test_each_worker_reads_its_parts(folder: Path) -> None:
    """Inside a loader worker `datasets` would give the workers shares of the one file that a part is."""
    read = []
    for workers in (0, 2):
        dataset = stream(str(folder), stream={"epoch_length": 18, "shuffle_buffer": 2, "parts": 2})
        run = RunConfig(task="captioning", batch_size_train=3, num_workers=workers)
        with closing(iter(TrainLoader({"cards": dataset}, run))) as batches:
            read.append([batch["text_input"] for batch in islice(batches, 12)])
    assert read[1] == read[0]
    assert {text for texts in read[0] for text in texts} == {f"picture number {n}" for n in range(18)}


def test_a_stream_without_any_samples_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = stream(str(folder))
    monkeypatch.setattr(streams, "read_part", lambda name: iter(()))
    items = list(dataset.items(Part(0, 1), seed=3))
    assert len(items) == streams.MOST_PROBLEMS
    assert all("no samples" in item.problem and "train" in item.problem for item in items)


def test_files_without_rows_are_left_out_of_a_stream(folder: Path) -> None:
    paths = sorted((folder / "data").iterdir())
    pq.write_table(pq.read_table(paths[0]).slice(0, 0), paths[0])
    dataset = stream(str(folder / "data/*.parquet"))
    assert len(dataset.shards) == 2
    items = list(islice(dataset.items(Part(0, 1), seed=3), 12))
    assert sorted(texts(items)) == sorted(f"picture number {n}" for n in range(6, 18))
    for path in paths[1:]:
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(InputError, match=r"annotations\.train.*train-2\.parquet has no rows"):
        stream(str(folder / "data/*.parquet"))


def test_parts_are_disjoint_and_samples_are_whole(folder: Path) -> None:
    dataset = stream(str(folder))
    one_pass = texts(list(islice(dataset.items(Part(0, 1), seed=3), 18)))
    assert sorted(one_pass) == sorted(f"picture number {n}" for n in range(18))
    seen = [set(texts(list(islice(dataset.items(Part(part, 3), seed=3), min(SIZES))))) for part in range(3)]
    assert sum(map(len, seen)) == len(set().union(*seen))
    with pytest.raises(InputError, match="num_workers"):
        dataset.check_parts(4, "cards")
    sample = next(iter(dataset.items(Part(0, 1), seed=0))).read()
    assert sample["image"].shape == (3, 16, 16)
    named = stream(str(folder), "classification", columns={"label": "kind"}, classes=["b", "a"])
    labels = {item.read()["label"] for item in islice(named.items(Part(0, 1), seed=0), 12)}
    assert labels == {0, 1}


def test_pictures_beside_the_rows_are_read(tmp_path: Path) -> None:
    """Hugging Face's imagefolder, whose rows have paths."""
    place = tmp_path / "pictures/train"
    place.mkdir(parents=True)
    for number in range(5):
        (place / f"{number}.png").write_bytes(shard_helpers.png(number))
    rows = [{"file_name": f"{number}.png", "text": f"picture number {number}"} for number in range(5)]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = list(islice(stream(str(tmp_path / "pictures")).items(Part(0, 1), seed=0), 5))
    assert sorted(texts(items)) == [f"picture number {n}" for n in range(5)]


def test_what_cannot_be_streamed_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"annotations\.train.*hf://nobody/cards.*127\.0\.0\.1"):
        stream("hf://nobody/cards")
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    with pytest.raises(MissingFileError, match=r"annotations\.train.*hf://nobody/cards.*LAVIS_LITE_OFFLINE"):
        stream("hf://nobody/cards")
    with pytest.raises(InputError, match=r"annotations\.train.*slice"):
        stream("hf://nobody/cards:train[:5]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"annotations\.train: .*empty"):
        stream(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="'caption'"):
        stream(str(folder), columns={})


def test_the_data_commands_download_no_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "model": {"arch": "blip_caption", **cli_helpers.SIZES},
        "datasets": {
            "cards": {
                "layout": "caption",
                "stream": {"epoch_length": 8},
                "build_info": {"annotations": {"train": {"storage": "hf://nobody/cards"}}},
            }
        },
        "run": {"task": "captioning", "train_splits": ["train"], "valid_splits": [], "init_lr": 1e-4, "max_epoch": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    for command in ("status", "download"):
        with pytest.raises(SystemExit) as ended:
            main([command, str(tmp_path / "recipe.yaml")])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert "hf://nobody/cards" in out
        assert "read as a stream" in out


def test_a_damaged_file_is_a_problem(folder: Path) -> None:
    path = folder / "data/train-1.parquet"
    dataset = stream(str(folder / "data/*.parquet"))
    path.write_bytes(path.read_bytes()[:400])
    items = list(islice(dataset.items(Part(0, 1), seed=3), 20))
    problems = [item.problem for item in items if item.sample is None]
    assert problems
    assert all("train-1.parquet" in problem for problem in problems)


@pytest.mark.slow
def test_a_run_trains_on_rows(folder: Path, tmp_path: Path) -> None:
    section = {
        "layout": "caption",
        "columns": {"caption": "text"},
        "build_info": {"annotations": {"train": {"storage": str(folder)}}},
        "stream": {"epoch_length": 8, "shuffle_buffer": 4},
        "vis_processor": {"train": EYE | {"image_size": 48}},
    }
    recipe = cli_helpers.project(
        tmp_path, "caption", {"run": {"valid_splits": [], "test_splits": [], "num_workers": 1}}
    )
    content = yaml.safe_load(recipe.read_text())
    content["datasets"] = {"cards": section | {"text_processor": {"train": {"name": "blip_caption", "prompt": "a "}}}}
    content["model"]["prompt"] = "a "
    recipe.write_text(yaml.safe_dump(content))
    assert cli_helpers.train(recipe) == 0
