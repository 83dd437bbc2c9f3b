"""A real train.py, killed at some step and resumed, ends bit for bit with the weights of a run that was not killed."""

import signal
import time
from pathlib import Path
from typing import Any

import doors
import pytest

from lavis_lite import checkpoint

pytestmark = pytest.mark.usefixtures("shapes_data")

TOTAL = 70


def long_project(folder: Path, name: str) -> Path:
    """A recipe of some hundred steps with dropout, shuffling, random crops, two workers, accumulation, validation."""
    folder.mkdir()
    (dataset,) = doors.RECIPES[name]["datasets"]
    crops = {"vis_processor": {"train": {"name": "blip_image_train", "image_size": 48}}}
    run = {"max_iters": TOTAL, "max_epoch": 100, "num_workers": 2, "checkpoint_every": 7, "accum_grad_iters": 2}
    return doors.project(folder, name, {"datasets": {dataset: crops}, "run": {**run, "test_splits": []}})


def kill_in_training(path: Path, *, after: int) -> int:
    """Starts train.py, kills it as soon as its log shows step `after`; the step of the checkpoint it left."""
    job = path.parent / "output" / "job"
    process = doors.process("train.py", "--cfg-path", str(path), "--job-id", "job")
    try:
        deadline = time.monotonic() + 120
        while not (job / "checkpoint_last.pth").exists() or count_steps(job / "log.txt") < after:
            assert process.poll() is None, f"ended by itself:\n{process.stdout.read()}"
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    return checkpoint.load(job / "checkpoint_last.pth")["step"]


def count_steps(log: Path) -> int:
    """The number of training steps in a log that is being written."""
    return log.read_text(encoding="utf-8").count('"loss"') if log.exists() else 0


def saved(job: Path) -> dict[str, Any]:
    """What both checkpoints of a job hold, without its settings (job names differ)."""
    files = {name: checkpoint.load(job / f"checkpoint_{name}.pth") for name in ("last", "best")}
    return {name: {key: value for key, value in file.items() if key != "config"} for name, file in files.items()}


@pytest.mark.parametrize(("name", "after"), [("caption", 23), ("retrieval", 36)])
def test_killed_and_resumed_equals_not_killed(name: str, after: int, tmp_path: Path) -> None:
    whole = long_project(tmp_path / "whole", name)
    assert doors.train(whole) == 0
    killed = long_project(tmp_path / "killed", name)
    step = kill_in_training(killed, after=after)
    assert 0 < step < TOTAL
    assert doors.train(killed, flags=["--resume", "auto"], job=None) == 0
    (job,) = (killed.parent / "output").iterdir()
    first, second = saved(whole.parent / "output" / "job"), saved(job)
    assert first["last"]["step"] == TOTAL
    doors.assert_same_state(first, second)
    losses = {
        row["step"]: row["loss"] for row in doors.steps(job)
    }  # steps between checkpoint and death are there twice
    assert losses == {row["step"]: row["loss"] for row in doors.steps(whole.parent / "output" / "job")}


def test_resume_in_another_folder(tmp_path: Path) -> None:
    """`run.resume_ckpt_path` goes on in a job of its own, from any checkpoint with training state."""
    path = doors.project(tmp_path, "caption", {"run": {"keep_checkpoints": 9, "checkpoint_every": 2}})
    assert doors.train(path, job="whole") == 0
    output = tmp_path / "output"
    middle = output / "whole" / "checkpoint_4.pth"
    assert middle.is_file()
    assert doors.train(path, f"run.resume_ckpt_path={middle}", job="second") == 0
    first, second = saved(output / "whole"), saved(output / "second")
    doors.assert_same_state(first, second)
    assert [row["step"] for row in doors.steps(output / "second")] == [5, 6]
    assert doors.metrics(output / "second", "test") == doors.metrics(output / "whole", "test")


def test_resume_takes_what_a_run_needs_and_no_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = doors.project(tmp_path, "caption", {"run": {"max_iters": 2, "test_splits": []}})
    assert doors.train(path, job="first") == 0
    best = tmp_path / "output" / "first" / "checkpoint_best.pth"
    assert doors.train(path, flags=["--resume", str(best)], job="second") == 2
    assert "holds no training state" in capsys.readouterr().err
    nlvr = doors.project(tmp_path, "nlvr", {"run": {"max_iters": 2}})
    assert doors.train(nlvr, flags=["--resume", str(best.with_name("checkpoint_last.pth"))], job="third") == 2
    assert "checkpoint_last.pth" in capsys.readouterr().err
