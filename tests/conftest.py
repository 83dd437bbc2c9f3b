"""Fixtures that several test files share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lavis_lite.common.logger import remove_handlers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that at the end no process works alone at a long file."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Leave the root logger as it was: a command sets its level, and handlers that write to the test's own streams."""
    root = logging.getLogger()
    level = root.level
    yield
    remove_handlers()
    root.setLevel(level)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of this test session, in which `shapes` is built once a config."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def shapes_data(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The session's data root as LAVIS_LITE_DATA, nothing fetched, one thread; torch's generator is left as it was."""
    monkeypatch.setenv("LAVIS_LITE_DATA", str(shapes_root))
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield shapes_root
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)
