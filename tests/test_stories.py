"""Four users' stories: scripts of the commands that the docs show, each from an empty folder with some pictures."""

import csv
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ports import free_port

ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue")
TINY = {
    "CAPTIONER": "blip_caption/tiny",
    "ANSWERER": "blip_vqa/tiny",
    "MATCHER": "blip_image_text_matching/tiny",
    "ENCODER": "blip_feature_extractor/tiny",
    "NO_WEIGHTS": "model.load_pretrained=false",
}


def make_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (64, 48), COLOURS[number % 3])
        image.putpixel((number, 3), (255, 255, 255))
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {COLOURS[number % 3]} wall")


def tell(name: str, folder: Path) -> str:
    """Run a story in a folder, with this interpreter's `lavis-lite` and `python`; return what it printed."""
    make_photos(folder / "photos", 40)
    make_photos(folder / "more_photos", 3)
    programs = folder / "bin"
    programs.mkdir()
    for program, arguments in (("lavis-lite", "-m lavis_lite "), ("python", "")):
        path = programs / program
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {
        **{**os.environ, **TINY, "PORT": str(free_port())},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{programs}:{os.environ['PATH']}"},
    }
    done = subprocess.run(
        ["bash", ROOT / "tests" / "stories" / f"{name}.sh"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_student_with_photos(tmp_path: Path) -> None:
    assert "activations about" in tell("student", tmp_path)
    page = (tmp_path / "output" / "photos" / "mine" / "report.html").read_text(encoding="utf-8")
    assert "CIDEr" in page
    with (tmp_path / "captions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


@pytest.mark.slow
def test_an_engineer_with_a_folder(tmp_path: Path) -> None:
    tell("engineer", tmp_path)
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 40
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 41
    assert len(np.load(tmp_path / "features.npy")) == 40
    assert len([line for line in (tmp_path / "found.txt").read_text().splitlines() if ".png" in line]) == 3
    with Image.open(tmp_path / "explained.png") as map_of_words:
        assert map_of_words.width > 64


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_a_researcher_from_lavis(tmp_path: Path) -> None:
    printed = tell("researcher", tmp_path)
    assert "blip/eval/caption_coco" in printed
    assert "CIDEr" in json.loads((tmp_path / "metrics.json").read_text())["test"]
    assert "133.3" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "hf" / "README.md").is_file()


@pytest.mark.slow
def test_a_visitor(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs gradio: pip install lavis-lite[demo]")
    printed = tell("visitor", tmp_path)
    assert "lavis_lite 0." in printed
    assert "torch" in printed
