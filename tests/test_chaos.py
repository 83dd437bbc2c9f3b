"""A round of `chaos.py` in a process of its own; by hand it does more."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "source"), [("1", []), ("2", []), ("1", ["--stream"]), ("2", ["--stream"])])
def test_chaos(processes: str, source: list[str]) -> None:
    script = Path(__file__).with_name("chaos.py")
    counts = ["--kills", "1", "--terms", "1", "--processes", processes, *source]
    result = subprocess.run(
        [sys.executable, str(script), *counts], capture_output=True, text=True, cwd=script.parents[1]
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "; 0 differences" in result.stdout
