"""The tutorial of docs/extending.md: its files and commands run, and its parts work inside the package too."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pages import DOCS, ROOT, blocks

from lavis_lite.cli import main as cli
from lavis_lite.common.config.config import Config, parser
from lavis_lite.common.registry import registry

PAGE = DOCS / "extending.md"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tutorial's folder with its data, the working folder; what it registers is forgotten afterwards."""
    for block in blocks(PAGE):
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LAVIS_LITE_DATA", ".")
    exec(compile((tmp_path / "make_signs.py").read_text(), "make_signs.py", "exec"), {})
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
        for table in registry.tables.values():
            for name in [name for name, item in table.items.items() if item.__module__ == path.stem]:
                del table.items[name]


def run(*argv: str) -> int:
    """train.py in this process; the exit code."""
    return cli.main(parser(), ["--cfg-path", "signs.yaml", "--options", "run.num_workers=0", *argv])


def test_the_parts_train_from_outside_the_package(project: Path) -> None:
    assert run("run.max_iters=3", "run.max_epoch=1", "--job-id", "job") == 0
    rows = [json.loads(line) for line in (project / "output/signs/job/log.txt").read_text().splitlines()]
    (metrics,) = [row["metrics"] for row in rows if "metrics" in row]
    assert 0 <= metrics["top_k"] <= 100
    lines = (project / "output/signs/job/predictions/val_step3.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 60
    assert {row["prediction"] for row in predictions} <= {"stop", "yield", "turn"}
    right = [row["prediction"] == row["references"][0] for row in predictions]
    assert metrics["top_k"] == pytest.approx(100 * sum(right) / 60)


@pytest.mark.slow
def test_the_pages_commands_run_and_signs_are_named(project: Path) -> None:
    (block,) = [block for block in blocks(PAGE) if block.language == "bash"]
    programs = project / "bin"
    programs.mkdir()
    for program, arguments in (("lavis-lite", "-m lavis_lite "), ("python", "")):
        path = programs / program
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    text = (
        f"set -euo pipefail\n{block.text}python use_signs.py\npython -m pytest -q -p no:cacheprovider test_signs.py\n"
    )
    path = f"{programs}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    (evaluation,) = (project / "output/signs").glob("*/evaluation.json")
    assert json.loads(evaluation.read_text())["metrics"]["val"]["top_k"] == 100
    assert "stop" in (project / "output/signs/first/report.html").read_text()


def test_a_mistake_is_the_line_that_the_page_shows(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in blocks(PAGE) if block.text.startswith("error: signs.yaml")]
    key, sign = block.text.splitlines()
    recipe = project / "signs.yaml"
    right = recipe.read_text()
    recipe.write_text(right.replace("num_classes", "num_clases"))
    assert run("--dry-run") == 2
    assert key in capsys.readouterr().err
    recipe.write_text(right)
    lines = (project / "signs/train.csv").read_text().splitlines()
    lines[6] = f"{lines[6].split(',')[0]},stopp"
    (project / "signs/train.csv").write_text("\n".join(lines))
    assert run("--dry-run") == 2
    assert sign in capsys.readouterr().err


def test_the_parts_are_checked_by_their_signatures(project: Path) -> None:
    for option, nearest in (
        ("model.num_clases=3", "num_classes"),
        ("run.kk=3", "'k'"),
        ("datasets.street_signs.buld_info=1", "build_info"),
        ("datasets.street_signs.vis_processor.train.image_sze=4", "image_size"),
    ):
        with pytest.raises(ValueError, match=nearest):
            Config.from_file("signs.yaml", [option])


@pytest.mark.slow
def test_the_parts_are_found_inside_the_package(project: Path) -> None:
    package = project / "lavis_lite"
    shutil.copytree(ROOT / "lavis_lite", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, folder in (("model", "models"), ("data", "datasets"), ("task", "tasks"), ("processor", "processors")):
        (project / f"sign_{name}.py").rename(package / folder / f"sign_{name}.py")
    signs = yaml.safe_load((project / "signs.yaml").read_text())
    model = package / "configs/models/vit_classifier/tiny.yaml"
    dataset = package / "configs/datasets/street_signs/default.yaml"
    for path, content in (
        (model, {"model": signs["model"], "preprocess": {"vis_processor": {"eval": {"name": "centre_square"}}}}),
        (dataset, {"datasets": signs["datasets"]}),
    ):
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(content))
    recipe = {"model": {"arch": "vit_classifier", "model_type": "tiny"}, "datasets": {"street_signs": None}}
    (project / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "run": {"task": "top_k", "k": 2}}))
    script = """
import lavis_lite
from lavis_lite.common.config import Config
from lavis_lite.models import load_model, model_zoo
from lavis_lite.processors import load_processor
cfg = Config.from_file("recipe.yaml")
assert cfg.task == {"k": 2} and cfg.model["num_classes"] == 3, cfg
assert cfg.datasets["street_signs"]["vis_processor"]["train"]["name"] == "centre_square", cfg
assert "vit_classifier" in model_zoo and load_model("vit_classifier", "tiny").head.out_features == 3
assert load_processor("centre_square", {"image_size": 48}) is not None
print(lavis_lite.__file__)
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(package / "__init__.py")
