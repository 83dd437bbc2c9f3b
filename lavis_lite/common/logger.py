"""Logs of a run: console, log.txt (one JSON object per line), TensorBoard, and running means.

Means stay on the device as tensors; nothing waits for the accelerator until a value is read at log time.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavis_lite.common import dist
from lavis_lite.common.transfer import upload

logger = logging.getLogger(__name__)


_handlers: list[logging.Handler] = []  # those that `setup` installed


def setup(job_dir: str | Path | None = None) -> None:
    """Send log messages to stderr and to `job_dir/console.txt`; from ranks other than 0 only warnings, to stderr.

    Call it after `dist.init`. A second call replaces the first one's handlers.
    """
    remove_handlers()
    _handlers.append(logging.StreamHandler(sys.stderr))
    if job_dir is not None and dist.is_main():
        path = Path(job_dir) / "console.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        _handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    who = "" if dist.world_size() == 1 else f"rank {dist.rank()} "
    root = logging.getLogger()
    for handler in _handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.INFO if dist.is_main() else logging.WARNING)


setup_logger = setup  # LAVIS's name


def remove_handlers() -> None:
    """Undo `setup`, and close console.txt."""
    while _handlers:
        handler = _handlers.pop()
        logging.getLogger().removeHandler(handler)
        handler.close()


def keep_line(line: str, error: BaseException | None = None) -> None:
    """Write a line that the terminal shows at the end, and an error's traceback, to console.txt, if there is one."""
    found = (type(error), error, error.__traceback__) if error is not None else None
    level = logging.INFO if error is None else logging.ERROR
    record = logger.makeRecord(logger.name, level, __file__, 0, line, (), found)
    for handler in _handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


class JsonLog:
    """Appends one JSON object per line to `path`, after ending a line that a kill cut short.

    A resumed run appends too: rows of steps that it repeats occur twice, the later one counts.
    """

    def __init__(self, path: str | Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = Path(path), enabled
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
                self._append("\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append `row`; tensors and arrays become plain numbers and lists, other objects their text."""
        if self.enabled:
            self._append(json.dumps(row, default=_plain, ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else str(value)


class TensorBoardLog:
    """TensorBoard events in `folder`; without tensorboard installed, writes nothing and warns once."""

    def __init__(self, folder: str | Path, *, enabled: bool = True) -> None:
        self.writer = None
        try:
            if enabled:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder))
        except ImportError:
            logger.warning("no TensorBoard events: `pip install tensorboard`, or set run.tensorboard=False")

    def write(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Record each number of `scalars` at `step`, and flush: a kill would lose pending events."""
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def write_images(self, name: str, pictures: Sequence[tuple[Image.Image, str]], *, step: int) -> None:
        """Record images under a name; their texts are drawn in them."""
        if self.writer is not None:
            for number, (image, _) in enumerate(pictures):
                self.writer.add_image(f"{name}/{number}", np.asarray(image), step, dataformats="HWC")
            self.writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if self.writer is not None:
            self.writer.close()


def row_of(values: Mapping[str, torch.Tensor | float]) -> torch.Tensor:
    """Return scalars of one device as one float64 vector; nothing waits for the device."""
    return torch.stack([torch.as_tensor(value).detach().reshape(()) for value in values.values()]).double()


class MetricLogger:
    """Named means since the last `drain`, over the steps and then over the ranks; summed on the device in float64.

    Values that are updated together are one vector, so that a step costs one addition.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.restored: dict[str, float] = {}
        """Totals from a checkpoint of names that have not been updated since."""

    def update(self, **values: torch.Tensor | float) -> None:
        """Add one scalar to each named series; no synchronisation with the device."""
        self.add(tuple(values), row_of(values))

    def add(self, names: tuple[str, ...], row: torch.Tensor) -> None:
        """Add a step's `row_of` values to the series of these names."""
        if names not in self.sums:
            start = torch.tensor([self.restored.pop(name, 0.0) for name in names], dtype=torch.float64)
            self.sums[names] = upload(start, row.device)
        self.sums[names] = self.sums[names] + row
        self.counts.update(names)

    def drain(self) -> dict[str, float]:
        """Return the mean of each series, and empty them. Every rank must call it, with the same names."""
        means = {name: total / count for name, (total, count) in self.state_dict().items()}
        self.sums.clear()
        self.counts.clear()
        self.restored.clear()
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Return total and count of each series, the total as a mean over the ranks; every rank must call it."""
        names = [name for together in self.sums for name in together]
        found = dist.all_reduce_mean(torch.cat(list(self.sums.values()))).tolist() if names else []
        totals = dict.fromkeys(names, 0.0) | self.restored
        for name, total in zip(names, found, strict=True):
            totals[name] += total
        return {name: (total, self.counts[name]) for name, total in totals.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Continue from what `state_dict` returned, on every rank, whatever their number was then."""
        self.sums.clear()
        self.restored = {name: total for name, (total, _) in state.items()}
        self.counts = Counter({name: count for name, (_, count) in state.items()})
