"""`train --data`: the YAML that it writes for each kind of data and model, and a run from the command line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import ROOT, log, process
from PIL import Image

from lavis_lite.cli.own_data import KINDS, arguments
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError, UserError
from lavis_lite.common.registry import registry

COLOURS = ("red", "green", "blue")


def make_images(folder: Path, count: int, *, texts: bool = False) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        image = Image.new("RGB", (40, 30), COLOURS[number % 3])
        image.putpixel((number % 40, 0), (255, 255, 255))
        image.save(folder / f"{number}.png")
        names.append(f"{number}.png")
        if texts:
            (folder / f"{number}.txt").write_text(f"a {COLOURS[number % 3]} wall")
    return names


def written(tmp_path: Path, data: Path | str, model: str, *more: str) -> dict[str, Any]:
    argv = arguments(["--data", str(data), "--model", model, "--out", str(tmp_path / "out"), *more])
    assert argv[:2] == ["--cfg-path", str(tmp_path / "out" / "train.yaml")]
    content: dict[str, Any] = yaml.safe_load(Path(argv[1]).read_text())
    return content


def test_a_folder_with_texts_is_captioned(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 3, texts=True)
    content = written(tmp_path, tmp_path / "photos", "blip_caption/tiny", "--epochs", "2", "--val-share", "0.2")
    assert content["model"] == {"arch": "blip_caption", "model_type": "tiny"}
    assert content["datasets"]["own"] == {
        "layout": "caption",
        "split_off": {"val": 0.2},
        "build_info": {"annotations": {"train": {"storage": str(tmp_path / "photos")}}},
    }
    assert content["run"]["task"] == "captioning"
    assert content["run"]["max_epoch"] == 2
    assert content["run"]["valid_splits"] == ["val"]
    assert content["run"]["test_splits"] == []
    Config.from_file(tmp_path / "out" / "train.yaml")


def test_a_table_with_other_names(tmp_path: Path) -> None:
    names = make_images(tmp_path / "data", 2)
    with (tmp_path / "data" / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((name, "a wall") for name in names)])
    own = written(tmp_path, tmp_path / "data" / "list.csv", "blip_retrieval/tiny")["datasets"]["own"]
    assert own["layout"] == "retrieval"
    assert own["columns"] == {"image": "file_name", "caption": "text"}
    assert own["build_info"]["images"] == {"storage": str(tmp_path / "data")}


def test_named_columns_come_first(tmp_path: Path) -> None:
    row = {"image": "a.png", "text": "x", "alt": "y"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    own = written(tmp_path, tmp_path / "list.jsonl", "blip_caption/tiny", "--columns", "caption=alt")["datasets"]["own"]
    assert own["columns"] == {"caption": "alt"}


@pytest.mark.parametrize(
    ("row", "layout", "columns"),
    [
        ({"image": "a.png", "instruction": "What?", "output": "a wall"}, "instruct", None),
        ({"image": "a.png", "question": "What?", "answer": "a wall"}, "vqa_instruct", None),
        ({"image": "a.png", "text": "a wall"}, "caption_instruct", {"caption": "text"}),
    ],
)
def test_an_instruction_model_takes_what_is_there(
    tmp_path: Path, row: dict[str, str], layout: str, columns: dict[str, str] | None
) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    content = written(tmp_path, tmp_path / "list.jsonl", "blip2_t5_instruct/tiny")
    own = content["datasets"]["own"]
    assert (own["layout"], own.get("columns")) == (layout, columns)
    assert content["model"]["freeze_vit"] is True
    Config.from_file(tmp_path / "out" / "train.yaml")


def test_splits_in_sub_folders_of_classes(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        for colour in COLOURS:
            make_images(tmp_path / "data" / split / colour, 2)
    content = written(tmp_path, tmp_path / "data", "blip_image_classification/tiny")
    annotations = content["datasets"]["own"]["build_info"]["annotations"]
    assert {split: Path(entry["storage"]).name for split, entry in annotations.items()} == {
        "train": "train",
        "val": "validation",
        "test": "test",
    }
    assert content["model"]["num_classes"] == 3
    assert "split_off" not in content["datasets"]["own"]
    assert content["run"]["test_splits"] == ["test"]


def test_a_data_set_of_the_hub_is_not_looked_at(tmp_path: Path) -> None:
    own = written(tmp_path, "hf://owner/name", "blip_caption/tiny", "--columns", "caption=text")["datasets"]["own"]
    assert own["build_info"] == {"annotations": {"train": {"storage": "hf://owner/name"}}}
    assert own["columns"] == {"caption": "text"}


FIELDS = {"question": "what?", "answer": "a wall", "instruction": "What?", "output": "a wall", "caption": "a wall"}


@pytest.mark.parametrize("arch", KINDS)
def test_every_architecture(tmp_path: Path, arch: str) -> None:
    if "classification" in KINDS[arch].layouts:
        make_images(tmp_path / "data" / "red", 1)
        data = tmp_path / "data"
    else:
        data = tmp_path / "list.jsonl"
        data.write_text(json.dumps({"image": "a.png", **FIELDS}))
    written(tmp_path, data, f"{arch}/tiny")
    cfg = Config.from_file(tmp_path / "out" / "train.yaml")
    assert registry.get_task_class(cfg.run.task)
    assert cfg.model["arch"] == arch


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--model", "blip_captoin/tiny"), "blip_caption"),
        (("--model", "blip_caption"), "ARCH/TYPE"),
        (("--model", "blip_vqa/tiny"), "question"),
        (("--columns", "caption=nothing"), "nothing"),
        (("--columns", "captions"), "FIELD=COLUMN"),
        (("--cfg-path", "x.yaml"), "--cfg-path"),
        (("--data", "missing/"), "missing"),
    ],
)
def test_mistakes(tmp_path: Path, more: tuple[str, ...], text: str) -> None:
    make_images(tmp_path / "photos", 1, texts=True)
    argv = ["--data", str(tmp_path / "photos"), "--model", "blip_caption/tiny", "--out", str(tmp_path / "out"), *more]
    with pytest.raises(UserError, match=text):
        arguments(argv)
    assert not (tmp_path / "out" / "train.yaml").exists()


def test_images_without_texts_are_counted(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    make_images(photos, 3, texts=True)
    argv = ["--data", str(photos), "--model", "blip_caption/tiny", "--out", str(tmp_path / "out")]
    first, *others = sorted(photos.glob("*.txt"))
    for text in (first, *others):
        text.unlink()
        count = 3 - len(list(photos.glob("*.txt")))
        found = f"{count} of 3 images have no .txt file, e.g. {first.stem}.*--sidecars"
        with pytest.raises(InputError, match=found):
            arguments(argv)
    assert not (tmp_path / "out").exists()


def test_an_edited_file_is_kept(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 1, texts=True)
    written(tmp_path, tmp_path / "photos", "blip_caption/tiny")
    written(tmp_path, tmp_path / "photos", "blip_caption/tiny")  # the same: no error
    path = tmp_path / "out" / "train.yaml"
    path.write_text(path.read_text().replace("max_epoch: 5", "max_epoch: 7"))
    with pytest.raises(InputError, match="--cfg-path"):
        written(tmp_path, tmp_path / "photos", "blip_caption/tiny")
    assert "max_epoch: 7" in path.read_text()


@pytest.mark.slow
def test_one_command_trains(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 30, texts=True)
    run = process(
        *(str(ROOT / "train.py"), "--data", str(tmp_path / "photos"), "--model", "blip_caption/tiny"),
        *("--out", str(tmp_path / "out"), "--epochs", "1", "--job-id", "job"),
        *("--options", "run.metrics=[bleu]", "run.num_workers=0"),
    )
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert (tmp_path / "out" / "job" / "checkpoint_best.pth").is_file()
    assert log(tmp_path / "out" / "job")[-1]["step"] == 1  # one whole batch of 16
