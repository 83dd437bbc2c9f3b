"""Job folders: what `--resume auto` finds, one writer per folder, leftovers, and folders of failed starts."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cli_helpers
import pytest
import torch
import yaml

from lavis_lite.cli import main as cli
from lavis_lite.common import checkpoint
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import FolderInUseError, InputError
from lavis_lite.common.locks import FolderLock, Lock
from lavis_lite.runners import jobs

CUT, FLIPPED, EMPTY = "cut", "flipped", "empty"


def write(folder: Path, name: str, *, step: int = 1, damage: str | None = None) -> Path:
    """A checkpoint, whole or damaged."""
    path = checkpoint.save({"step": step, "tensor": torch.full((64,), 0.5)}, folder / f"checkpoint_{name}.pth")
    data = bytearray(path.read_bytes())
    if damage == FLIPPED:
        data[data.index(torch.full((64,), 0.5).numpy().tobytes()) + 7] ^= 1
    path.write_bytes({CUT: data[: len(data) // 2], EMPTY: b""}.get(damage or "", data))
    return path


def auto(output: Path, job_id: str | None = None) -> RunConfig:
    return RunConfig(task="captioning", output_dir=str(output), resume="auto", job_id=job_id)


@pytest.mark.parametrize("damage", [CUT, FLIPPED, EMPTY])
def test_a_damaged_last_checkpoint_falls_back_to_the_newest_whole_step(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By step as a number: 9 is before 10, whatever was written last."""
    write(tmp_path / "job", "10")
    write(tmp_path / "job", "9")
    write(tmp_path / "job", "11", damage=damage)
    write(tmp_path / "job", "last", damage=damage)
    run, folder = jobs.start_job(auto(tmp_path, "job"))
    assert run.resume_ckpt_path == str(folder / "checkpoint_10.pth")
    assert "checkpoint_last.pth" in caplog.text
    assert "resuming" in caplog.text
    assert caplog.text.count("checkpoint_11.pth") == 1


@pytest.mark.parametrize("job_id", ["job", None])
def test_a_folder_that_holds_checkpoints_is_never_started_over(tmp_path: Path, job_id: str | None) -> None:
    write(tmp_path / "job", "last", damage=CUT)
    write(tmp_path / "job", "4", damage=FLIPPED)
    write(tmp_path / "job", "best")  # holds no training state
    before = {path: path.read_bytes() for path in (tmp_path / "job").iterdir()}
    with pytest.raises(InputError, match=r"checkpoint_last\.pth.*checkpoint_4\.pth.*--job-id"):
        jobs.start_job(auto(tmp_path, job_id))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_job_ids_are_no_patterns(tmp_path: Path) -> None:
    other = write(tmp_path / "abc", "last")
    for name in ("run[1]", "a*"):
        own = write(tmp_path / name, "last")
        os.utime(other, (2e9, 2e9))
        assert jobs.newest_checkpoint(tmp_path, job_id=name) == own
    assert jobs.newest_checkpoint(tmp_path, job_id="b?") is None


def test_replacing_an_earlier_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "job", "last")
    jobs.start_job(RunConfig(task="captioning", output_dir=str(tmp_path), job_id="job"))
    assert "holds checkpoints of an earlier run" in caplog.text


HOLDER = """
import os, sys, time
from pathlib import Path
from lavis_lite.common.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
if not os.fork():  # as a loader worker, which has let go of the lock once it runs
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock of `tmp_path`, and its child."""
    environment = {**os.environ, "PYTHONPATH": str(cli_helpers.ROOT)}
    start = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(start, env=environment, text=True, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_folder_has_one_writer(tmp_path: Path, holder: tuple[subprocess.Popen[str], int]) -> None:
    """The kernel ends the lock with its holder, also while a worker of the holder lives on."""
    process, child = holder
    with (
        pytest.raises(FolderInUseError, match=rf"process {process.pid} on host {socket.gethostname()} since"),
        jobs.held(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    os.kill(child, 0)  # is alive
    with jobs.held(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused(
    tmp_path: Path, shapes_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, "caption")
    lock = FolderLock(tmp_path / "output" / "job")
    lock.take()
    assert cli_helpers.train(path) == 2
    assert "in use by process" in capsys.readouterr().err
    assert cli_helpers.evaluate(path, job="job") == 2
    lock.release()
    assert cli_helpers.evaluate(path, job="job") == 0
    assert cli_helpers.evaluate(path, job="job") == 0  # and it is released


def test_without_locks_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with jobs.held(tmp_path):
        assert "cannot be locked" in caplog.text


def test_leftovers_are_swept_under_the_lock(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    left = [tmp_path / ".checkpoint_3.pth.tmp", tmp_path / "result" / ".val_captions.json.12-ab.tmp"]
    kept = [tmp_path / "checkpoint_3.pth", tmp_path / ".netrc"]
    for path in (*left, *kept):
        path.write_text("x")
    with jobs.held(tmp_path):
        assert [path.exists() for path in left] == [False, False]
        assert all(path.exists() for path in kept)


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    """Each writes while the other does; what is read in between is always whole."""
    path, seen = tmp_path / "file", []

    def slow(file: object) -> None:
        file.write(b"first" * 100)
        checkpoint.write_text(path, "second")
        seen.append(path.read_text())
        file.write(b"first" * 100)

    checkpoint.atomic_write(path, slow)
    assert seen == ["second"]
    assert path.read_bytes() == b"first" * 200
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_start_leaves_no_folder(tmp_path: Path, shapes_data: Path) -> None:
    path = cli_helpers.project(tmp_path, "caption")
    assert cli_helpers.train(path, "run.batch_size_train=1000", job=None) == 2
    assert cli_helpers.train(path, "run.valid_splits=[dev]", job=None) == 2
    assert cli_helpers.train(path, "run.valid_splits=[dev]", job="named") == 2
    assert not list((tmp_path / "output").iterdir())


def test_a_failed_resume_leaves_the_job(tmp_path: Path, shapes_data: Path) -> None:
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 2, "test_splits": []}})
    assert cli_helpers.train(path) == 0
    files = [entry for entry in (tmp_path / "output" / "job").rglob("*") if entry.is_file()]
    before = {entry: entry.read_bytes() for entry in files if entry.name not in (".lock", "console.txt")}
    assert cli_helpers.train(path, "run.batch_size_train=5", flags=["--resume", "auto"]) == 2
    assert {entry: entry.read_bytes() for entry in before} == before  # config.yaml is still what the weights are of
    assert sorted(files) == sorted(entry for entry in (tmp_path / "output" / "job").rglob("*") if entry.is_file())


@pytest.mark.slow
def test_the_configuration_of_a_resumed_job_resumes_nothing(
    tmp_path: Path, shapes_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else an evaluation with it would read that job's last weights instead of those it is given."""
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 4, "test_splits": []}})
    assert cli_helpers.train(path, "run.max_iters=2") == 0
    assert cli_helpers.train(path, flags=["--resume", "auto"]) == 0
    job = tmp_path / "output" / "job"
    run = yaml.safe_load((job / "config.yaml").read_text())["run"]
    assert (run["resume"], run["resume_ckpt_path"]) == (None, None)
    for name in (jobs.LAST, jobs.BEST):
        assert checkpoint.load(job / name)["config"]["run"]["resume_ckpt_path"] is None
    saved = checkpoint.load(job / jobs.BEST)
    saved["model"] = {key: torch.zeros_like(value) for key, value in saved["model"].items()}
    zeros = checkpoint.save(saved, tmp_path / "zeros.pth")
    older = f"run.resume_ckpt_path={job / jobs.LAST}"  # as earlier versions wrote it
    assert cli_helpers.evaluate(job / "config.yaml", older, weights=zeros, job="given") == 0
    assert "is not read: --checkpoint names the weights" in caplog.text
    assert cli_helpers.evaluate(path, weights=zeros, job="expected") == 0
    assert cli_helpers.evaluate(path, weights=job / jobs.BEST, job="other") == 0
    given, expected, other = (
        json.loads((tmp_path / "output" / name / "result" / "val_captions.json").read_text())
        for name in ("given", "expected", "other")
    )
    assert given == expected != other


def test_an_evaluation_names_its_weights_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption")
    with pytest.raises(SystemExit) as ended:
        cli.evaluate_main(["--cfg-path", str(path), "--resume", "a.pth", "--checkpoint", "b.pth"])
    assert ended.value.code == 2
    assert "--resume a.pth: names weights, as --checkpoint does" in capsys.readouterr().err


def test_a_step_checkpoint_is_the_last_ones_file(tmp_path: Path, shapes_data: Path) -> None:
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 4, "test_splits": [], "keep_checkpoints": 2}})
    assert cli_helpers.train(path, "run.checkpoint_every=2") == 0
    job = tmp_path / "output" / "job"
    assert (job / "checkpoint_4.pth").samefile(job / "checkpoint_last.pth")
    assert not (job / "checkpoint_2.pth").samefile(job / "checkpoint_last.pth")


def test_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    source = checkpoint.write_text(tmp_path / "a", "text")
    assert checkpoint.link_or_copy(source, tmp_path / "b").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_an_abandoned_shapes_build_is_swept(tmp_path: Path) -> None:
    from lavis_lite.datasets.shapes.build import ensure_built
    from lavis_lite.datasets.shapes.scene import ShapesConfig

    root = tmp_path / "shapes"
    config = ShapesConfig(num_train=5, num_val=2, num_test=2, gallery_size=2)
    target = ensure_built(config, root)
    dead, alive = root / f".{target.name}-dead", root / f".{target.name}-alive"
    for folder in (dead, alive):
        folder.mkdir()
        os.utime(folder, (time.time() - 3600,) * 2)
    lock = Lock(alive)
    assert lock.take()
    target.rename(tmp_path / "away")
    assert ensure_built(config, root) == target
    assert not dead.exists()
    assert alive.exists()
    lock.release()
