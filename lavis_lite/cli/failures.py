"""Ends of a command: its exit code, and one line for each error that is not a bug.

Errors that the user can correct end with 2, failures of the machine (out of memory, a dead loader worker, a lost rank)
with 1, stop signals with 143 or 130. Any other error is a bug and keeps its traceback.
"""

import errno
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lavis_lite.common.config.config import ConfigError
from lavis_lite.common.errors import RankZeroFailed, UserError
from lavis_lite.runners.stopping import Stopped

logger = logging.getLogger(__name__)

_DISK = "free some space or write to another disk"
_PERMISSIONS = "check the permissions of the file and its folder"
SYSTEM_ERRORS = {
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EROFS: "write to another folder",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "shorten the name",
    errno.EIO: "the disk or network drive failed",
    errno.ESTALE: "the network drive failed",
}
"""Errors of the operating system that a user can correct, and the advice for each."""
MEMORY = (
    "lower run.batch_size_train (and raise run.accum_grad_iters by the same factor), run.batch_size_eval or "
    "model.image_size; recompute activations (BLIP: model.vit_grad_ckpt=true, BLIP-2: model.use_grad_checkpoint=true); "
    "set run.precision=bf16"
)
LIMITS = (
    "lower run.num_workers (0 loads in the main process), or raise the machine's limits of open files (ulimit -n) and "
    "of processes (ulimit -u)"
)
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.EAGAIN)
_NO_MORE = ("Too many open files", "can't start new thread", "unable to open shared memory object")
_FULL = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\) (?:is killed by signal: (.*?)\.|exited)")


def exit_code(execute: Callable[[], int | None], *, command: Sequence[str] = ()) -> int:
    """Run `execute` and return its exit code, after printing one line for an error that is not a bug, which is raised.

    `command` is the command line that was given.
    """
    try:
        return execute() or 0
    except Stopped as stop:
        if is_first_process():
            line = _stop_line(stop, command)
            print(line, file=sys.stderr)
            _keep(line)
        return stop.exit_code
    except KeyboardInterrupt:  # before the signals are caught
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    except RankZeroFailed as error:
        logger.warning("%s", error)
        return 2
    except Exception as error:
        found = _explained(error)
        if found is None:
            raise
        code, line = found
        if is_first_process() or not isinstance(error, ConfigError):  # a mistake in a file is the same on every rank
            print(line, file=sys.stderr)
        _keep(line, error)
        return code


def is_first_process() -> bool:
    """Whether this is rank 0, by torchrun's environment: before `dist.init`, `dist.rank()` is 0 everywhere."""
    return os.environ.get("RANK", "0") == "0"


def _explained(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the line of an error that is not a bug."""
    text = _own_words(error)
    if isinstance(error, UserError):
        return 2, f"error: {text}"
    if isinstance(error, OSError):
        number = error.errno or _errno_in(text)
        if number in SYSTEM_ERRORS:
            return 2, f"error: {text}: {SYSTEM_ERRORS[number]}"
    failure, rank = explain(error), os.environ.get("RANK")
    return None if failure is None else (1, f"error: {failure}" if rank is None else f"error: rank {rank}: {failure}")


def _errno_in(text: str) -> int | None:
    """Return the number in the text of an OSError, which torch raises anew without it if a loader worker raised it."""
    found = re.match(r"\[Errno (\d+)\]", text)
    return int(found[1]) if found else None


def _keep(line: str, error: Exception | None = None) -> None:
    if "torch" in sys.modules:  # the logger imports it; a run that has not imported it has no log file
        from lavis_lite.common import logger as run_logger

        run_logger.keep_line(line, error)


def _stop_line(stop: Stopped, command: Sequence[str]) -> str:
    """Return where a run stopped, and the command that continues it."""
    if stop.job_id is None:
        return f"stopped by {stop}: nothing was saved; start it again with: {_shell(command)}"
    at = f"stopped at step {stop.step:,}" if stop.step is not None else "stopped"
    kept, words = [], iter(command)
    for word in words:
        if word in ("--resume", "--job-id"):
            next(words, None)
        elif not word.startswith(("--resume=", "--job-id=")):
            kept.append(word)
    return f"{at} by {stop}; resume with: {_shell([*kept, '--resume', 'auto', '--job-id', stop.job_id])}"


def _shell(command: Sequence[str]) -> str:
    """Return the command line as typed: after `python` for a script, after `torchrun ...` under torchrun."""
    if not command:
        return ""
    program, *arguments = command
    is_script = program.endswith(".py")
    text = shlex.join([program if is_script else Path(program).name, *arguments])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return f"torchrun ... {text}"
    return f"python {text}" if is_script else text


def explain(error: BaseException) -> str | None:
    """Return which part of the machine failed and what to change, or None for another error."""
    text = _own_words(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return f"out of memory on the CPU: {_memory_hint('cpu')}"
    if number in _TOO_MANY or any(part in text for part in _NO_MORE):
        return f"{text.split('. ')[0]}: {LIMITS}"
    if not isinstance(error, RuntimeError):
        return None
    worker = _WORKER.search(text)
    if worker:
        return _worker(worker[1].strip(), worker[2])
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _FULL):
        return f"out of memory ({_first_sentences(text)}): {_memory_hint('cpu' if 'CPUAllocator' in text else 'gpu')}"
    return _rank(error)


def _own_words(error: BaseException) -> str:
    """Return the message; of an error that a loader worker raised, without the traceback that torch puts before it."""
    text = str(error).strip()
    if not text.startswith("Caught ") or " in DataLoader worker process " not in text:
        return text
    _, found, words = text.rpartition(f"{type(error).__name__}: ")
    return words if found else text.splitlines()[-1].split(": ", 1)[-1]


def _memory_hint(place: str) -> str:
    return MEMORY if place == "gpu" else f"{MEMORY}; lower run.num_workers"


def _worker(pid: str, signal: str | None) -> str:
    how = f"was killed by the signal {signal}" if signal else "ended unexpectedly"
    return (
        f"loader worker {pid} {how}, perhaps because memory or /dev/shm is full: lower run.num_workers (0 loads in the "
        "main process) or run.batch_size_train, or give a container more shared memory (docker run --shm-size=8g)"
    )


def _rank(error: RuntimeError) -> str | None:
    from lavis_lite.common import dist

    found = dist.lost_rank(error)
    if found is None:
        return None
    return f"{found}. run.step_timeout is how many seconds a step waits for it; --resume auto continues"


def _first_sentences(text: str) -> str:
    """The message's first two sentences without the place in torch's source."""
    line = re.sub(r"^\[enforce fail at [^\]]*\]( err == 0)?[. ]*", "", text.splitlines()[0])
    return ". ".join(re.split(r"\.\s", line)[:2]).rstrip(". ")
