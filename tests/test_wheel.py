"""The built wheel, used from an empty folder: it has every file of the package, and the recipes by name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
METADATA = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel's files; the source is copied, so that building leaves nothing in the clone."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in METADATA:
        shutil.copy(ROOT / name, source)
    for name in ("lavis_lite", "projects"):
        shutil.copytree(ROOT / name, source / name, ignore=JUNK)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "installed")
    return built / "installed"


def lavis_lite(installed: Path, folder: Path, *words: str) -> str:
    """Run a command with the wheel's package in a folder; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lavis_lite", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def files_below(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if path.suffix != ".pyc"}


def test_the_wheel_has_every_file_of_the_package_and_the_recipes(installed: Path) -> None:
    wanted = files_below(ROOT / "lavis_lite") | {f"recipes/{name}" for name in files_below(ROOT / "projects")}
    assert files_below(installed / "lavis_lite") == wanted


def test_recipes_and_tables_need_no_clone(installed: Path, tmp_path: Path) -> None:
    names = lavis_lite(installed, tmp_path, "recipes").split()
    assert "blip/eval/caption_coco" in names
    table = lavis_lite(installed, tmp_path, "table", "blip")
    assert "lavis-lite evaluate --cfg-path blip/eval/caption_coco" in table
    lavis_lite(installed, tmp_path, "recipes", "blip/quickstart/caption", "--copy", "mine.yaml")
    assert "output/quickstart" in (tmp_path / "mine.yaml").read_text()


def test_images_are_captioned_and_checked_by_a_named_recipe(installed: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    assert lavis_lite(installed, tmp_path, "caption", "red.png", "--model", "blip_caption/tiny").startswith("red.png\t")
    checked = ("evaluate", "--cfg-path", "blip/quickstart/caption", "--dry-run", "--options")
    printed = lavis_lite(installed, tmp_path, *checked, "model.load_pretrained=false", "run.num_workers=0")
    assert "shapes_caption/test" in printed
