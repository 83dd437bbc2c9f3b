"""Processes that start with the package imported: they are forked from one that has done so, which saves 5 s of each.

Otherwise a script runs as it would by itself: with its own arguments, environment, output and process id.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from ports import free_port

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli.main", "models", "tasks", "runners.runner", "datasets.caption", "processors")


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cli_helpers", *(f"lavis_lite.{name}" for name in PACKAGES)])
    return context


def _start_as_by_default() -> None:
    """Undo that a process takes over how it was started: loader workers would be started so too, and outlive it."""
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)


def _run(script: str, argv: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    """In the new process: become `python script *argv`."""
    _start_as_by_default()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = [script, *argv]
    sys.path.insert(0, str(ROOT / Path(script).parent))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Warm:
    """One process or several, with the methods of subprocess.Popen; the output of all is one file."""

    def __init__(self, script: str, argv: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        handle, self.output = tempfile.mkstemp(suffix=".txt")
        os.close(handle)
        weakref.finalize(self, os.unlink, self.output)
        arguments = [(str(script), list(argv), dict(one), self.output) for one in environments]
        self.processes = [_server().Process(target=_run, args=one) for one in arguments]
        for process in self.processes:
            process.start()

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """None while one runs; else the first exit code other than 0, if there is one."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of all; as with torchrun, one that fails ends the others."""
        deadline = time.monotonic() + (timeout or 600)
        while self.returncode is None:
            if any(process.exitcode for process in self.processes):
                self.send_signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.output, timeout or 600)
            next(process for process in self.processes if process.exitcode is None).join(0.1)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait, and return what was printed."""
        self.wait(timeout)
        return self.printed(), None

    def printed(self) -> str:
        return Path(self.output).read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start(script: str, *argv: object, world: int = 0, **environment: Any) -> Warm:
    """`python script *argv` below the repository, or `world` ranks of it (without torchrun)."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    if not world:
        return Warm(script, [str(one) for one in argv], [common])
    common |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return Warm(script, [str(one) for one in argv], ranks)


def spawn(function: Callable[..., object], *arguments: object, world: int) -> None:
    """Call `function(rank, *arguments)` in `world` processes; an error in one ends all and is raised."""
    _server()  # what these processes are forked from, too
    mp.start_processes(_call, (function, *arguments), nprocs=world, start_method="forkserver")


def _call(rank: int, function: Callable[..., object], *arguments: object) -> None:
    _start_as_by_default()
    function(rank, *arguments)
