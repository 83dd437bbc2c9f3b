"""Checkpoints that a thread writes while training continues: their content, errors, and the end of a run."""

import threading
import time
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import WriteError
from lavis_lite.common.sharding import on_host
from lavis_lite.runners import runner as runner_module
from lavis_lite.runners.checkpoint_writer import CheckpointWriter

pytestmark = pytest.mark.usefixtures("shapes_data")
RUN = {"checkpoint_every": 1, "keep_checkpoints": 9, "valid_splits": [], "test_splits": [], "max_iters": 4}


def content(job: Path) -> dict[str, Any]:
    """All checkpoints of steps, without their settings."""
    files = {path.name: checkpoint.load(path) for path in job.glob("checkpoint_[0-9]*.pth")}
    return {name: {key: value for key, value in file.items() if key != "config"} for name, file in files.items()}


def test_files_are_those_of_a_run_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the weights change while a file is written."""
    path = cli_helpers.project(tmp_path, "caption", {"run": RUN})
    assert cli_helpers.train(path, job="waits") == 0
    write, threads = runner_module.write_last, set()

    def slowly(saved: Any, **settings: Any) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.1)
        write(saved, **settings)

    monkeypatch.setattr(runner_module, "write_last", slowly)
    assert cli_helpers.train(path, "run.async_checkpoint=true", job="aside") == 0
    assert threads == {"checkpoint_0"}
    waits, aside = (content(tmp_path / "output" / job) for job in ("waits", "aside"))
    assert len(waits) == 4
    cli_helpers.assert_same_state(waits, aside)
    sizes = [(tmp_path / "output" / job / "checkpoint_4.pth").stat().st_size for job in ("waits", "aside")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)  # tied weights are there once
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_an_error_ends_the_run_after_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, "caption", {"run": {**RUN, "max_iters": 6, "checkpoint_every": 2}})

    def full(*arguments: Any, **settings: Any) -> None:
        raise WriteError(28, "cannot write checkpoint_last.pth: the disk is full")

    monkeypatch.setattr(runner_module, "write_last", full)
    assert cli_helpers.train(path, "run.async_checkpoint=true") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert len(cli_helpers.steps(tmp_path / "output" / "job")) in (2, 3, 4)


def test_leaving_waits_and_tells_one_error() -> None:
    written = []
    with CheckpointWriter(is_aside=True) as writer:
        writer.write(lambda saved: (time.sleep(0.05), written.append(saved["step"]))[1], {"step": 1})
    assert written == [1]

    def fails(saved: Any) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), CheckpointWriter(is_aside=True) as writer:
        writer.write(fails, {})
    with pytest.raises(ValueError, match="of the step"), CheckpointWriter(is_aside=True) as writer:
        writer.write(fails, {"step": int("of the step")})


def test_copies_of_tied_tensors_are_tied() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    copy = on_host({"a": weight, "b": [weight], "c": weight.t(), "step": 3})
    weight.zero_()
    assert copy["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy["a"].data_ptr() == copy["b"][0].data_ptr()
    assert copy["c"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copy["step"] == 3
