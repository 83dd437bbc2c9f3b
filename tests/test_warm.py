"""Processes of warm.py behave as those that start by themselves."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

SCRIPT = """
import atexit, multiprocessing, os, sys
atexit.register(print, "at exit")
print(__name__, sys.argv[1:], os.environ.get("OWN"), os.getcwd(), multiprocessing.get_start_method(), flush=True)
print("an error", file=sys.stderr)
sys.exit(3)
"""
LOADER = """
import os, sys, time
from torch.utils.data import DataLoader
for batch in DataLoader(range(10**6), batch_size=2, num_workers=2):
    print("batch", flush=True)
    time.sleep(0.05)
"""


def test_a_script_gets_what_it_gets_by_itself(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OWN": "x"}
    alone = subprocess.run(
        [sys.executable, script, "a", "b c"], cwd=warm.ROOT, env=environment, text=True, capture_output=True
    )
    started = warm.start(str(script), "a", "b c", OWN="x")
    printed, _ = started.communicate(60)
    assert started.returncode == alone.returncode == 3
    assert sorted(printed.splitlines()) == sorted((alone.stdout + alone.stderr).splitlines())
    assert multiprocessing.get_start_method() in printed


def test_a_failing_rank_ends_the_other(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nsys.exit(4) if os.environ['RANK'] == '1' else time.sleep(600)\n")
    assert warm.start(str(script), world=2).wait(60) in (4, -signal.SIGTERM)


def test_loader_workers_do_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOADER)
    process = warm.start(str(script))
    deadline = time.monotonic() + 60
    while "batch" not in process.printed():
        assert process.poll() is None, process.printed()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they look every five seconds
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.1)


def children(parent: int) -> list[int]:
    """The processes that a process started."""
    path = Path(f"/proc/{parent}/task/{parent}/children")
    if not path.exists():
        pytest.skip("reads Linux's /proc")
    return [int(number) for number in path.read_text().split()]
