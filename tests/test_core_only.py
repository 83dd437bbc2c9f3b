"""Training and generating need no package that only reads videos, scores captions or draws curves."""

import os
import subprocess
import sys
from pathlib import Path

import cli_helpers
import pytest

OPTIONAL = ("decord", "pycocotools", "pycocoevalcap", "tensorboard", "torch.utils.tensorboard", "matplotlib")
DRIVER = """
import sys
for name in {optional!r}:
    sys.modules[name] = None  # importing it then raises ImportError
from lavis_lite.cli.main import main, parser
sys.exit(main(parser(), sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_task_trains_without_the_optional_packages(shapes_data: Path, tmp_path: Path) -> None:
    cfg = cli_helpers.project(tmp_path, "retrieval")
    command = [sys.executable, "-c", DRIVER.format(optional=OPTIONAL), "--cfg-path", str(cfg)]
    environment = os.environ | {"PATH": "", "OMP_NUM_THREADS": "1"}  # no PATH: no Java
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cli_helpers.ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("**/checkpoint_best.pth"))
