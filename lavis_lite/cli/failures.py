"""Ends of a command: its exit code, and one line for each error that is not a bug.

Errors that the user can correct end with 2, failures of the machine (out of memory, a dead loader worker, a lost rank)
with 1, stop signals with 143 or 130. Any other error is a bug and keeps its traceback.
"""

import argparse
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

SYSTEM_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.EIO, errno.ESTALE),
)
"""Errors of the operating system that a user can correct; their texts say what is wrong with which file."""
MEMORY = (
    "lower run.batch_size_train (and raise run.accum_grad_iters by the same factor), run.batch_size_eval, "
    "model.image_size or (on a CPU) run.num_workers; recompute activations (BLIP: model.vit_grad_ckpt=true, BLIP-2: "
    "model.use_grad_checkpoint=true); set run.precision=bf16"
)
LIMITS = "lower run.num_workers, or raise the limits of open files (ulimit -n) and of processes (ulimit -u)"
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
    """Return whether this is rank 0, by torchrun's environment: before `dist.init`, `dist.rank()` is 0 everywhere."""
    return os.environ.get("RANK", "0") == "0"


def _explained(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the line of an error that is not a bug."""
    text = _own_words(error)
    if isinstance(error, UserError):
        return 2, f"error: {text}"
    if isinstance(error, OSError):
        found = re.match(r"\[Errno (\d+)\]", text)  # torch raises a loader worker's error anew, without its errno
        number = error.errno or (int(found[1]) if found else 0)
        if number in SYSTEM_ERRORS:
            return 2, f"error: {text}"
    failure, rank = explain(error), os.environ.get("RANK")
    return None if failure is None else (1, f"error: {failure}" if rank is None else f"error: rank {rank}: {failure}")


def _keep(line: str, error: Exception | None = None) -> None:
    if "torch" in sys.modules:  # the logger imports it; a run that has not imported it has no log file
        from lavis_lite.common import logger as run_logger

        run_logger.keep_line(line, error)


def _stop_line(stop: Stopped, command: Sequence[str]) -> str:
    """Return where a run stopped, and the command that continues it."""
    if stop.job_id is None:
        return f"stopped by {stop}: nothing was saved; start it again with: {_shell(command)}"
    at = f"stopped at step {stop.step:,}" if stop.step is not None else "stopped"
    replaced = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    replaced.add_argument("--resume")
    replaced.add_argument("--job-id")
    _, kept = replaced.parse_known_args(command)
    return f"{at} by {stop}; resume with: {_shell([*kept, '--resume', 'auto', '--job-id', stop.job_id])}"


def _shell(command: Sequence[str]) -> str:
    """Return the command line as typed: after `python` for a script, after `torchrun ...` under torchrun."""
    if not command:
        return ""
    program, *arguments = command  # `lavis-lite evaluate` is a program here
    is_script = program.endswith(".py")
    text = f"{shlex.quote(program) if is_script else Path(program).name} {shlex.join(arguments)}"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return f"torchrun ... {text}"
    return f"python {text}" if is_script else text


def explain(error: BaseException) -> str | None:
    """Return which part of the machine failed and what to change, or None for another error."""
    text = _own_words(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return f"out of memory on the CPU: {MEMORY}"
    if number in _TOO_MANY or any(part in text for part in _NO_MORE):
        return f"{text.split('. ')[0]}: {LIMITS}"
    if not isinstance(error, RuntimeError):
        return None
    if worker := _WORKER.search(text):
        how = f"was killed by the signal {worker[2]}" if worker[2] else "ended unexpectedly"
        return (
            f"loader worker {worker[1].strip()} {how}, perhaps because memory or /dev/shm is full: lower "
            "run.num_workers or run.batch_size_train, or give a container more memory (docker run --shm-size=8g)"
        )
    if type(error).__name__ == "OutOfMemoryError" or any(part in text for part in _FULL):
        line = re.sub(r"^\[enforce fail at [^\]]*\]( err == 0)?[. ]*", "", text.splitlines()[0])
        first_sentences = ". ".join(re.split(r"\.\s", line)[:2]).rstrip(". ")
        return f"out of memory ({first_sentences}): {MEMORY}"
    from lavis_lite.common import dist

    lost = dist.lost_rank(error)
    return lost and f"{lost}. run.step_timeout is how many seconds a step waits for it; --resume auto continues"


def _own_words(error: BaseException) -> str:
    """Return the message; of an error that a loader worker raised, without the traceback that torch puts before it."""
    text = str(error).strip()
    if not text.startswith("Caught ") or " in DataLoader worker process " not in text:
        return text
    _, found, words = text.rpartition(f"{type(error).__name__}: ")
    return words if found else text.splitlines()[-1].split(": ", 1)[-1]
