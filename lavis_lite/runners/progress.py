"""Where a run tells how it goes: log.txt, TensorBoard, and a live line on a terminal or plain lines elsewhere."""

import datetime
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common import dist
from lavis_lite.common.logger import JsonLog, TensorBoardLog

logger = logging.getLogger(__name__)


class Progress:
    """Rank 0's account of a run in `job_dir`; on other ranks everything is a no-op but the arithmetic.

    `samples_per_step` is the global batch; rates count training time only.
    """

    def __init__(self, job_dir: Path, *, tensorboard: bool = True) -> None:
        main = dist.is_main()
        self.log = JsonLog(job_dir / "log.txt", enabled=main)
        self.events = TensorBoardLog(job_dir / "tensorboard", enabled=main and tensorboard)
        self.live = main and sys.stderr.isatty()
        self.bar: Any = None
        self.started, self.steps = time.perf_counter(), 0

    def start_epoch(self, *, epoch: int, num_epochs: int, step: int, end: int) -> None:
        """Begins to time, and on a terminal opens the bar of, the iterations `step` to `end` of `epoch` (0-based)."""
        self.started, self.steps = time.perf_counter(), 0
        if self.live:
            from tqdm import tqdm

            self.bar = tqdm(total=end, initial=step, desc=f"epoch {epoch + 1}/{num_epochs}", unit="step", leave=False)

    def advance(self) -> None:
        """Counts one iteration."""
        self.steps += 1
        if self.bar is not None:
            self.bar.update()

    def report(self, row: Mapping[str, Any], *, samples_per_step: int, total: int) -> None:
        """Writes a training row (`step`, `epoch`, `lr`, losses ...) with the rate since the last one."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        steps_per_s = max(self.steps, 1) / seconds
        row = {**row, "samples_per_s": round(steps_per_s * samples_per_step, 2)}
        self.log.write(row)
        scalars = {f"train/{name}": value for name, value in row.items() if name not in ("step", "epoch")}
        self.events.write(scalars, step=row["step"])
        left = datetime.timedelta(seconds=round((total - row["step"]) / steps_per_s))
        parts = {name: f"{value:.4g}" for name, value in row.items() if isinstance(value, float)}
        if self.bar is not None:
            self.bar.set_postfix({**parts, "left": str(left)})
        else:
            text = "  ".join(f"{name} {value}" for name, value in parts.items())
            logger.info(f"epoch {row['epoch'] + 1}  step {row['step']}/{total}  {text}  time left {left}")
        self.started, self.steps = time.perf_counter(), 0

    def end_epoch(self) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def report_metrics(self, split: str, metrics: Mapping[str, Any], *, step: int, epoch: int) -> None:
        """Writes what an evaluation found."""
        self.log.write({"split": split, "step": step, "epoch": epoch, "metrics": dict(metrics)})
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self.events.write({f"{split}/{name}": value for name, value in numbers.items()}, step=step)
        parts = [f"{name} {value:.4g}" for name, value in numbers.items()]
        parts += [f"({metrics['note']})"] if "note" in metrics else []
        logger.info(f"{split}: " + "  ".join(parts))

    def report_mixture(self, samples: Mapping[str, int], shares: Mapping[str, float], *, is_concat: bool) -> None:
        """Writes, before the first step, each training dataset's number of samples and its share of the batches, or
        with `is_concat` of the samples.
        """
        datasets = {name: {"samples": samples[name], "share": share} for name, share in shares.items()}
        self.log.write({"mixture": datasets})
        how = "each batch mixes the samples of" if is_concat else "each step draws its batch from one of"
        logger.info(f"{how} {len(datasets)} datasets:\n{_table(datasets)}")

    def report_datasets(self, datasets: Mapping[str, Mapping[str, float | None]], *, step: int, epoch: int) -> None:
        """Writes each dataset's part in `epoch`: its batches and their mean loss (None without any), or its samples."""
        self.log.write({"step": step, "epoch": epoch, "datasets": datasets})
        numbers = {f"datasets_{key}/{name}": v for name, row in datasets.items() for key, v in row.items()}
        self.events.write({name: value for name, value in numbers.items() if value is not None}, step=step)
        logger.info(f"epoch {epoch + 1} by dataset:\n{_table(datasets)}")

    def close(self) -> None:
        """Closes bar and event file."""
        self.end_epoch()
        self.events.close()


def _table(datasets: Mapping[str, Mapping[str, float | None]]) -> str:
    """The rows by name as lines of aligned columns below their heads."""
    head = ["dataset", *next(iter(datasets.values()))]
    lines = [head, *([name, *map(_cell, row.values())] for name, row in datasets.items())]
    width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join("  ".join([name.ljust(width), *map(str.rjust, cells, widths)]) for name, *cells in lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
