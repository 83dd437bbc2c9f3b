"""Stop signals: the step is finished, the run saved, the way to resume said; a second signal ends at once."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import warm

from lavis_lite.cli import failures
from lavis_lite.common import checkpoint, dist
from lavis_lite.runners.stopping import Stopped, StopSignals
from lavis_lite.tasks.captioning import CaptionTask

SIGNALS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
CHANGES = {"run": {"test_splits": [], "accum_grad_iters": 2, "max_epoch": 1, "num_workers": 0}}

pytestmark = pytest.mark.usefixtures("shapes_data", "heard")


@pytest.fixture
def heard() -> Iterator[None]:
    """No stop signal is ignored, as a shell's background job and all that it starts ignore SIGINT."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def last(path: Path) -> dict[str, Any]:
    return checkpoint.load(path.parent / "output" / "job" / "checkpoint_last.pth")


def pair(folder: Path) -> tuple[Path, Path]:
    """The same recipe twice, for a run that is not disturbed and one that is."""
    for name in ("whole", "stopped"):
        (folder / name).mkdir()
    return cli_helpers.project(folder / "whole", "caption", CHANGES), cli_helpers.project(
        folder / "stopped", "caption", CHANGES
    )


def signal_in(monkeypatch: pytest.MonkeyPatch, method: str, *, call: int, signum: int) -> None:
    """Send the signal to this process in the call number `call` (from 1) of a task's method."""
    calls, original = [], getattr(CaptionTask, method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(CaptionTask, method, wrapped)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), SIGNALS.items(), ids=lambda value: str(value))
def test_a_signal_finishes_the_update_saves_and_says_how_to_resume(
    signum: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first of the two batches of the second step, which is finished."""
    whole, path = pair(tmp_path)
    assert cli_helpers.train(whole) == 0
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        signal_in(patch, "train_step", call=3, signum=signum)
        assert cli_helpers.train(path, flags=["--resume", "auto"]) == code
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    assert last(path)["step"] == 2
    err = capsys.readouterr().err
    name = signal.Signals(signum).name
    assert f"stopped at step 2 by {name}; resume with: " in err
    assert err.rstrip().endswith(f"--cfg-path {path} --resume auto --job-id job")
    assert "Traceback" not in err
    assert cli_helpers.train(path, flags=["--resume", "auto"]) == 0
    for key in last(whole).keys() - {"config"}:
        cli_helpers.assert_same_state(last(whole)[key], last(path)[key], where=key)


@pytest.mark.slow
def test_a_signal_in_the_last_step_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation is still to come: the resumed run makes up for it."""
    whole, path = pair(tmp_path)
    assert cli_helpers.train(whole) == 0
    with pytest.MonkeyPatch.context() as patch:
        signal_in(patch, "train_step", call=12, signum=signal.SIGTERM)
        assert cli_helpers.train(path) == 143
    assert (last(path)["step"], last(path)["epoch"]) == (6, 0)
    assert cli_helpers.train(path, flags=["--resume", "auto"]) == 0
    assert cli_helpers.metrics(path.parent / "output" / "job", "val") == cli_helpers.metrics(
        whole.parent / "output" / "job", "val"
    )
    cli_helpers.assert_same_state(last(whole)["ranks"], last(path)["ranks"])


@pytest.mark.slow
def test_a_signal_in_the_last_step_of_an_epoch_loses_no_row_of_a_mixture(tmp_path: Path) -> None:
    """The first epoch's batches and losses by dataset are logged after the restart, and are not in the second's."""
    run = {"runner": "runner_iter", "max_iters": 12, "iters_per_inner_epoch": 6, "valid_splits": []}
    run |= {"accum_grad_iters": 1, "max_epoch": 2, "train_dataset_ratios": {"shapes_caption": 1, "shapes_pairs": 1}}
    changes = [CHANGES, {"datasets": {"shapes_pairs": cli_helpers.SHAPES}, "run": run}]
    rows = []
    for name, stops in (("whole", False), ("stopped", True)):
        (tmp_path / name).mkdir()
        path = cli_helpers.project(tmp_path / name, "caption", *changes)
        if stops:
            steps = max(row["step"] for row in cli_helpers.steps(tmp_path / "whole" / "output" / "job"))
            with pytest.MonkeyPatch.context() as patch:
                signal_in(patch, "train_step", call=steps // 2, signum=signal.SIGTERM)
                assert cli_helpers.train(path) == 143
            assert (last(path)["step"], last(path)["epoch"]) == (steps // 2, 0)
        assert cli_helpers.train(path, flags=["--resume", "auto"]) == 0
        log = cli_helpers.log(tmp_path / name / "output" / "job")
        rows.append([(row["step"], row["datasets"]) for row in log if "datasets" in row])
    assert len(rows[0]) == 2
    assert rows[0] == rows[1]


def test_a_signal_in_validation_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, "caption", CHANGES)
    signal_in(monkeypatch, "valid_step", call=1, signum=signal.SIGTERM)
    assert cli_helpers.train(path) == 143
    assert "stopped at step 6 by SIGTERM; resume with: " in capsys.readouterr().err
    assert "stopped at step 6 by SIGTERM" in (tmp_path / "output" / "job" / "console.txt").read_text()


def test_a_signal_in_preparation_or_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, "caption", CHANGES, {"run": {"test_splits": ["test"]}})
    with pytest.MonkeyPatch.context() as patch:
        signal_in(patch, "build_model", call=1, signum=signal.SIGINT)
        assert cli_helpers.train(path) == 130
    assert "stopped by SIGINT: nothing was saved; start it again with: " in capsys.readouterr().err
    assert not (tmp_path / "output" / "job").exists()
    with pytest.MonkeyPatch.context() as patch:
        signal_in(patch, "evaluate", call=1, signum=signal.SIGTERM)
        assert cli_helpers.evaluate(path) == 143
    told = capsys.readouterr().err
    assert "stopped by SIGTERM" in told
    assert "--resume auto --job-id evaluation" in told


def test_a_signal_while_the_group_is_left_says_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of torchrun, which ends a rank that has just lost another."""
    path = cli_helpers.project(tmp_path, "caption", {"run": {"checkpoint_every": 1, "max_iters": 2}})

    def stop() -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(dist, "shutdown", stop)
    assert cli_helpers.train(path) == 143
    assert capsys.readouterr().err.rstrip().endswith("--resume auto --job-id job")


def test_in_another_than_the_main_thread_no_signal_is_caught(tmp_path: Path) -> None:
    path, codes = cli_helpers.project(tmp_path, "caption", CHANGES, {"run": {"max_iters": 2}}), []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: codes.append(cli_helpers.train(path)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored() -> None:
    """As nohup and shells leave SIGINT for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_raises_where_nothing_is_deferred() -> None:
    with StopSignals() as stop:
        with pytest.raises(Stopped, match="SIGUSR1"):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signum == signal.SIGUSR1


def python(code: str) -> subprocess.Popen[str]:
    """A process that catches signals as `stop`, and says `ready`."""
    head = "import os, signal, time\nimport lavis_lite.runners.stopping as stopping\n"
    environment = {**os.environ, "PYTHONPATH": str(cli_helpers.ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", head + code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    return process


DEFERRED = """
with stopping.StopSignals() as stop, stop.deferred():
    print("ready", flush=True)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        time.sleep(0.1)
"""
SWALLOWED = """
stopping.GRACE = 1.0
class Ending:
    def __del__(self):
        print("ready", flush=True)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(0.1)
with stopping.StopSignals() as stop:
    Ending()
"""


PUT_OFF = """
class Ending:
    def __del__(self):
        print("ready", flush=True)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            time.sleep(0.1)
try:
    with stopping.StopSignals() as stop:
        Ending()
        for _ in range(100):
            time.sleep(0.1)
except stopping.Stopped as stop:
    os._exit(stop.exit_code + 1)
"""


@pytest.mark.slow
def test_a_signal_in_a_destructor_is_raised_after_it() -> None:
    """Python ignores exceptions there."""
    process = python(PUT_OFF)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143 + 1
    assert "Exception ignored" not in process.stderr.read()


@pytest.mark.parametrize(("signum", "code"), SIGNALS.items(), ids=lambda value: str(value))
@pytest.mark.slow
def test_a_second_signal_ends_at_once(signum: int, code: int) -> None:
    process = python(DEFERRED)
    process.send_signal(signum)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signum)
    assert process.wait(5) == code
    assert "again, so the process ends at once" in process.stderr.read()


def test_a_signal_that_comes_twice_at_the_same_time_counts_once() -> None:
    """From a scheduler, which signals all processes of a job, and forwarded by torchrun, which is one of them."""
    process = python(DEFERRED)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_signal_that_the_main_thread_does_not_see_ends_the_process_after_the_grace() -> None:
    process = python(SWALLOWED)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143


def started(path: Path, *, world: int = 0, log: str = '"loss"', flags: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """train.py in a session of its own, once its log has a training step."""
    process = cli_helpers.process("train.py", "--cfg-path", str(path), "--job-id", "job", *flags, world=world)
    text = path.parent / "output" / "job" / "log.txt"
    deadline = time.monotonic() + 120
    while not text.exists() or log not in text.read_text():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.05)
    return process


LONG = {"run": {"max_iters": 100_000, "max_epoch": 100_000, "test_splits": [], "valid_splits": [], "num_workers": 2}}


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_too_and_they_live_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal signals the whole process group."""
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: popen(*a, start_new_session=True, **k))
    path = cli_helpers.project(tmp_path, "caption", LONG)
    process = started(path)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert f"stopped at step {last(path)['step']:,} by SIGINT" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_torchrun_forwards_sigterm_and_both_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, "caption", LONG, {"run": {"batch_size_train": 2}})
    process = started(path, world=2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    ours = output.split("torch/distributed/elastic")[0]
    assert f"stopped at step {last(path)['step']:,} by SIGTERM; resume with: torchrun ... train.py" in output, output
    assert output.count("stopped at step") == 1
    assert "error: " not in ours
    assert len(last(path)["ranks"]) == 2


def two_ranks(path: Path, *options: str) -> list[warm.Warm]:
    """Both ranks as processes of ours, without torchrun, which would end the others."""
    from ports import free_port

    port = free_port()
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    flags = ["--cfg-path", str(path), "--job-id", "job", *(["--options", *options] if options else [])]
    return [warm.start("train.py", *flags, RANK=str(r), LOCAL_RANK=str(r), **common) for r in (0, 1)]


def wait_for_step(path: Path, ranks: list[warm.Warm]) -> None:
    text = path.parent / "output" / "job" / "log.txt"
    deadline = time.monotonic() + 120
    while not text.exists() or '"loss"' not in text.read_text():
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[0] for rank in ranks]
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.05)


@pytest.mark.slow
def test_one_signalled_rank_stops_both_after_the_same_step(tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, "caption", LONG, {"run": {"batch_size_train": 2}})
    ranks = two_ranks(path)
    wait_for_step(path, ranks)
    ranks[1].send_signal(signal.SIGUSR1)
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], outputs
    assert f"stopped at step {last(path)['step']:,} by SIGUSR1" in outputs[0]


@pytest.mark.slow
def test_a_hung_rank_is_noticed(tmp_path: Path) -> None:
    path = cli_helpers.project(tmp_path, "caption", LONG, {"run": {"batch_size_train": 2}})
    ranks = two_ranks(path, "run.step_timeout=4")
    wait_for_step(path, ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    output, _ = ranks[0].communicate(timeout=300)
    assert ranks[0].returncode == 1, output
    assert 3 < time.monotonic() - began < 30
    ranks[1].kill()
    ranks[1].communicate()
    assert output.count("error: ") == 1
    assert "error: rank 0: another rank has not answered in time" in output
    assert "run.step_timeout" in output
    assert "Traceback" not in output
    assert "Timed out waiting" in (path.parent / "output" / "job" / "console.txt").read_text()


CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 9 is free."


def throw(error: Exception) -> None:
    raise error


def fails(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    monkeypatch.setattr(CaptionTask, "train_step", lambda self, model, samples: action())


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (lambda: torch.empty(10**15), r"error: out of memory \(DefaultCPUAllocator: can't allocate memory"),
        (lambda: [0] * 2**60, "error: out of memory on the CPU: "),
        (
            lambda: throw(torch.OutOfMemoryError(CUDA)),
            r"error: out of memory \(CUDA out of memory\. Tried to allocate 2",
        ),
    ],
)
def test_out_of_memory_is_one_line(
    action: Callable[[], object],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = cli_helpers.project(tmp_path, "caption", CHANGES)
    fails(monkeypatch, action)
    assert cli_helpers.train(path) == 1
    err = capsys.readouterr().err
    (told,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert re.match(line, told)
    for key in ("run.batch_size_train", "run.accum_grad_iters", "use_grad_checkpoint"):
        assert key in told
    assert "Traceback" not in err
    assert "Traceback" in (tmp_path / "output" / "job" / "console.txt").read_text()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}",
)
def test_limits_of_the_machine_are_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(monkeypatch, lambda: throw(error))
    assert cli_helpers.train(cli_helpers.project(tmp_path, "caption", CHANGES)) == 1
    err = capsys.readouterr().err
    (told,) = [text for text in err.splitlines() if text.startswith("error: ")]
    for part in ("run.num_workers", "ulimit -n", "ulimit -u"):
        assert part in told
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory on the CPU: "),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: out of memory"
            ),
            "out of memory (out of memory): ",
        ),
    ],
)
def test_full_memory_has_several_names(error: Exception, line: str) -> None:
    found = failures.explain(error)
    assert found is not None
    assert found.startswith(line)


def read_in_workers(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do this where a loader worker reads a sample; the checks before a run read some in the main process."""
    from lavis_lite.datasets.caption import CaptionTrainDataset

    original = CaptionTrainDataset.__getitem__

    def read(self: CaptionTrainDataset, index: int) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            action()
        return original(self, index)

    monkeypatch.setattr(CaptionTrainDataset, "__getitem__", read)


def test_a_dead_loader_worker_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_in_workers(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    path = cli_helpers.project(tmp_path, "caption", CHANGES, {"run": {"num_workers": 1}})
    assert cli_helpers.train(path) == 1
    (told,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    for part in ("loader worker", "run.num_workers", "/dev/shm"):
        assert part in told


def test_a_mistake_that_a_loader_worker_finds_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lavis_lite.common.errors import InputError

    def refuse() -> None:
        raise InputError("record 3: caption: expected text, got 5")

    read_in_workers(monkeypatch, refuse)
    path = cli_helpers.project(tmp_path, "caption", CHANGES, {"run": {"num_workers": 1}})
    assert cli_helpers.train(path) == 2
    err = capsys.readouterr().err
    assert "error: record 3: caption: expected text, got 5\n" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_what_the_system_refuses_a_loader_worker_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_in_workers(monkeypatch, lambda: throw(PermissionError(errno.EACCES, "Permission denied", "/data/a.bin")))
    path = cli_helpers.project(tmp_path, "caption", CHANGES, {"run": {"num_workers": 1}})
    assert cli_helpers.train(path) == 2
    err = capsys.readouterr().err
    assert "error: [Errno 13] Permission denied: '/data/a.bin'" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cli_helpers.project(tmp_path, "caption", CHANGES)
    fails(monkeypatch, lambda: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        cli_helpers.train(path)
