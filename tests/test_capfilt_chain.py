"""`lavis-lite capfilt`: chains of steps, their rows and seeds, what is done already, and the table."""

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import warm
import yaml

from lavis_lite.cli import capfilt
from lavis_lite.cli.capfilt_chain import ROWS, jobs, read_chain
from lavis_lite.cli.capfilt_table import interval, table
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.files import ConfigError

ROOT = cli_helpers.ROOT
CHAINS = sorted((ROOT / "projects").rglob("_chain.yaml"))


def chain(folder: Path, **changes: Any) -> Path:
    (folder / "a.yaml").touch()
    steps = {
        "texts": {"recipe": "a.yaml", "command": "evaluate", "rows": ["captioner", "filter", "both"]},
        "pretrain": {
            "recipe": "a.yaml",
            "per_row": True,
            "options": {"model.pretrained": "{output}/x{suffix}.pth", "datasets.d.where": {"s": ["{row}", 1]}},
            "row_options": {"none": {"run.max_iters": 7}},
        },
    }
    path = folder / "chain.yaml"
    content = {"output_dir": "out", "steps": steps, "report": {"TR": "pretrain.test.txt_r1"}, **changes}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_steps_become_jobs_per_row_and_seed(tmp_path: Path) -> None:
    path = chain(tmp_path)
    found = jobs(read_chain(path), path, rows=["none", "both"], seeds=[1, 2], options=["run.device=cpu"])
    assert [str(job.folder) for job in found] == [
        *("out/texts", "out/pretrain_none_1", "out/pretrain_none_2", "out/pretrain_both_1", "out/pretrain_both_2")
    ]
    assert found[0].arguments() == [
        *("evaluate", "--cfg-path", str(tmp_path / "a.yaml"), "--job-id", "texts", "--options"),
        *("run.device=cpu", "run.output_dir=out"),
    ]
    assert found[1].arguments() == [
        *("train", "--cfg-path", str(tmp_path / "a.yaml"), "--job-id", "pretrain_none_1", "--resume", "auto"),
        *("--options", "model.pretrained=out/x_none_1.pth", 'datasets.d.where={"s": ["none", 1]}'),
        *("run.max_iters=7", "run.seed=1", "run.device=cpu", "run.output_dir=out"),
    ]
    assert not any(word.startswith("run.max_iters") for word in found[3].arguments())


def test_a_step_that_no_row_needs_is_left_out(tmp_path: Path) -> None:
    path = chain(tmp_path)
    found = jobs(read_chain(path), path, rows=["none"], seeds=[1], options=[])
    assert [job.step for job in found] == ["pretrain"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": {"a": {"recipe": "b.yaml"}}}, "steps.a.recipe.*b.yaml"),
        ({"steps": {"a": {"recipe": "a.yaml", "comand": "train"}}}, "comand.*command"),
        ({"steps": {"a": {"recipe": "a.yaml", "rows": ["bth"]}}}, "steps.a.rows.*bth.*both"),
        ({"steps": {"a/b": {"recipe": "a.yaml"}}}, "a/b"),
        ({"report": {"TR": "texts.test.txt_r1"}}, "report.TR.*texts.test.txt_r1"),
        ({"report": {"TR": "pretrain.test"}}, "report.TR.*pretrain.test"),
        ({"output_dir": 3}, "output_dir.*3"),
    ],
)
def test_mistakes_in_a_chain_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_chain(chain(tmp_path, **change))


@pytest.mark.parametrize("rows", [["noone"], ["both", "both"]])
def test_a_wrong_row_is_named(rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        capfilt.main(["--cfg-path", str(chain(tmp_path)), "--rows", *rows])
    assert end.value.code == 2
    assert rows[0] in capsys.readouterr().err


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.parent.relative_to(ROOT / "projects").as_posix())
def test_every_chains_jobs_are_configurations(path: Path) -> None:
    """With the options of all rows; and what a step reads is what an earlier one writes."""
    read = read_chain(path)
    found = jobs(read, path, rows=ROWS, seeds=[1], options=[])
    folders = {str(job.folder) for job in found}
    for job in found:
        options = job.arguments()[job.arguments().index("--options") + 1 :]
        cfg = Config.from_file(job.recipe, options)
        sources = [cfg.model.get("pretrained"), cfg.model.get("finetuned")]
        sources.append((cfg.task.get("captioner") or {}).get("checkpoint"))
        for section in cfg.datasets.values():
            if section.get("reader") == "capfilt":
                sources.append(section["build_info"]["annotations"]["train"]["url"])
        for source in sources:
            if source and source.startswith(read.output_dir):
                assert any(source.startswith(f"{folder}/") for folder in folders), (job.folder, source)


# The table


def test_intervals_are_students() -> None:
    values = [61.0, 64.0, 65.5]
    assert interval(values) == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3))
    assert interval(values[:1]) is None
    assert interval([2.0, 2.0]) == 0


def test_gains_are_taken_seed_by_seed() -> None:
    found = {"none": {"TR": [60.0, 70.0, 80.0]}, "both": {"TR": [62.0, 73.0, 81.0]}}
    lines = [line.split() for line in table(found)]
    half = 4.303 * statistics.stdev([2, 3, 1]) / math.sqrt(3)
    assert lines[0] == ["TR"]
    assert lines[1] == ["none", "70.00", "±", f"{4.303 * 10 / math.sqrt(3):.2f}"]
    assert lines[3] == ["both", "-", "none", "+2.00", "±", f"{half:.2f}"]


# The figures of the quickstart


def test_precision_and_recall_are_of_wrong_web_texts() -> None:
    spec = importlib.util.spec_from_file_location("capfilt_truth", ROOT / "run_scripts/capfilt_truth.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.Text
    web = [text("web", kept, true) for kept, true in [(True, True)] * 5 + [(True, False)] + [(False, False)] * 3]
    written = [text("synthetic", True, True)] * 2 + [text("synthetic", False, False)]
    found = module.figures([*web, text("web", False, True), *written])
    assert found["filter: precision on wrong web texts"] == pytest.approx(75)  # three of the four that were dropped
    assert found["filter: recall on wrong web texts"] == pytest.approx(75)  # three of the four wrong ones
    assert found["filter: recall on wrong written texts"] == 100
    assert found["true texts: web, all"] == pytest.approx(60)
    assert found["true texts: web, kept"] == pytest.approx(100 * 5 / 6)
    assert found["true texts: after CapFilt"] == pytest.approx(100 * 7 / 8)
    assert found["kept of the true web texts"] == pytest.approx(100 * 5 / 6)
    assert module.figures([text("web", True, True)])["filter: precision on wrong web texts"] is None


# From beginning to end


def recipes(folder: Path) -> Path:
    """A chain of a captioner, texts, and a pretraining that is tested by retrieval, all tiny."""
    output = folder / "output/chain"
    web = {"shapes_pairs": cli_helpers.SHAPES}
    few = {"max_iters": 2, "valid_splits": [], "test_splits": []}
    captioner = cli_helpers.project(folder, "caption", {"run": few})
    captioner.rename(folder / "captioner.yaml")
    written = {"arch": "blip_caption", "model_type": "tiny", "checkpoint": f"{output}/captioner/checkpoint_last.pth"}
    run = {"task": "capfilt", "captioner": written, "max_len": 12, "test_splits": ["train"], "valid_splits": []}
    model = {"arch": "blip_image_text_matching"}
    texts = cli_helpers.project(folder, "pretrain", {"model": model, "datasets": web, "run": run})
    texts.write_text(texts.read_text().replace("  queue_size: 48\n", ""))
    texts.rename(folder / "texts.yaml")
    manifest = {"url": f"{output}/texts/result/train_texts/manifest.json"}
    own = {"builder": "pairs", "reader": "capfilt", "build_info": {"annotations": {"train": manifest}}}
    change = {"datasets": {"shapes_pairs": None, "bootstrapped": {**own, "where": {"kept": True}}}, "run": few}
    cli_helpers.project(folder, "pretrain", change)
    cli_helpers.project(folder, "retrieval", {"run": {"valid_splits": []}})
    tested = {"model.checkpoint": "{output}/pretrain{suffix}/checkpoint_last.pth"}
    content = {
        "output_dir": str(output),
        "steps": {
            "captioner": {"recipe": "captioner.yaml"},
            "texts": {"recipe": "texts.yaml", "command": "evaluate"},
            "pretrain": {
                "recipe": "pretrain.yaml",
                "per_row": True,
                "row_options": {"none": {"datasets.bootstrapped.where": {"source": "web", "kept": [True, False]}}},
            },
            "retrieval": {"recipe": "retrieval.yaml", "command": "evaluate", "per_row": True, "options": tested},
        },
        "report": {"TR@1": "retrieval.test.txt_r1", "IR@1": "retrieval.test.img_r1"},
    }
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_chain_runs_from_the_captioner_to_the_table(
    tmp_path: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started(command: list[str], env: Mapping[str, str]) -> warm.Warm:
        assert command[1:3] == ["-m", "lavis_lite.cli"]
        return warm.Warm("lavis_lite/cli/__main__.py", command[3:], [env])

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(capfilt.subprocess, "Popen", started)
    path = recipes(tmp_path)

    def run(*argv: str) -> int:
        with pytest.raises(SystemExit) as end:
            capfilt.main(["--cfg-path", str(path), "--rows", "none", "both", *argv])
        return int(end.value.code or 0)

    assert run() == 0
    output = tmp_path / "output/chain"
    names = {
        "captioner",
        "texts",
        *(f"{step}_{row}_42" for step in ("pretrain", "retrieval") for row in ("none", "both")),
    }
    assert {folder.name for folder in output.iterdir() if folder.is_dir()} == names
    assert all((output / name / "done.json").is_file() for name in names)
    figures = json.loads((output / "capfilt.json").read_text())
    for row in ("none", "both"):
        percent = json.loads((output / f"retrieval_{row}_42/evaluation.json").read_text())["percent"]["test"]
        assert figures[row] == {"TR@1": [percent["txt_r1"]], "IR@1": [percent["img_r1"]]}
    used = cli_helpers.log(output / "pretrain_none_42")
    assert used

    # again: nothing runs
    monkeypatch.setattr("subprocess.Popen", None)
    capsys.readouterr()
    assert run() == 0
    assert capsys.readouterr().err.count("done already") == len(names)
    # with other arguments
    assert run("--options", "run.num_workers=1") == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("captioner", "run.num_workers=1", "delete")), error
    # after an earlier step was run again
    (output / "texts/done.json").touch()
    assert run() == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("pretrain_none_42", "texts")), error


@pytest.mark.slow
def test_a_chain_runs_under_torchrun(tmp_path: Path, shapes_data: Path) -> None:
    path = recipes(tmp_path)
    script = tmp_path / "chain.py"
    script.write_text("from lavis_lite.cli.capfilt import main\nmain()\n")
    arguments = ("--cfg-path", str(path), "--only", "captioner", "texts")
    done = cli_helpers.process(str(script), *arguments, world=2)
    output, _ = done.communicate(timeout=600)
    assert done.returncode == 0, output
    folder = tmp_path / "output/chain/texts"
    assert (folder / "done.json").is_file()
    assert "2 processes" in output
    assert len((folder / "result/train_texts/000000.jsonl").read_text().splitlines()) >= 24


def test_a_failing_step_ends_the_chain_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    real, calls = capfilt.subprocess.Popen, []

    def failing(command: list[str], **settings: Any) -> Any:
        calls.append(command)
        return real([sys.executable, "-c", "raise SystemExit(3)"], **settings)

    monkeypatch.setattr(capfilt.subprocess, "Popen", failing)
    with pytest.raises(SystemExit) as end:
        capfilt.main(["--cfg-path", str(chain(tmp_path))])
    assert end.value.code == 3
    assert len(calls) == 1
    assert not list(tmp_path.rglob("done.json"))
