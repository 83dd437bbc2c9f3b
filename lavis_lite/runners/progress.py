"""A run's log lines: log.txt, TensorBoard, plain lines, and below them a bar on a terminal."""

import contextlib
import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_lite.common import dist
from lavis_lite.common.logger import JsonLog, TensorBoardLog
from lavis_lite.common.progress import bar
from lavis_lite.runners.plan import Plan
from lavis_lite.runners.sampling import TrainSampler
from lavis_lite.runners.speed import UNITS, Speed
from lavis_lite.runners.trackers import TRACKERS, Pictures, Tracker, find_packages

logger = logging.getLogger(__name__)


class Progress:
    """Writes rank 0's log of a run in `job_dir`; other ranks write nothing. Rates count training time only."""

    def __init__(self, job_dir: Path, *, speed: Speed, tensorboard: bool = True, trackers: Sequence[str] = ()) -> None:
        is_main = dist.is_main()
        self.speed = speed
        self.job_dir = job_dir
        self.packages = find_packages(trackers if is_main else ())
        self.trackers: list[Tracker] = []
        self.log = JsonLog(job_dir / "log.txt", enabled=is_main)
        self.events = TensorBoardLog(job_dir / "tensorboard", enabled=is_main and tensorboard)
        self.bar = tqdm(disable=True)

    @contextlib.contextmanager
    def epoch(self, epoch: int, plan: Plan, *, step: int) -> Iterator[None]:
        """Time the steps of (inner) epoch `epoch` (0-based) from `step` on, with a bar on a terminal."""
        self.speed.begin()
        self.speed.step_flops = None  # with `model.cache_features` the image encoder runs in the first epoch only
        first, end = plan.bounds(epoch)
        name = f"epoch {epoch + 1}/{plan.num_epochs}"
        with bar(end - first, initial=step - first, name=name, unit="step") as self.bar:
            yield

    def advance(self) -> None:
        """Count one step."""
        self.speed.num_steps += 1
        self.bar.update()

    def report(self, step: int, epoch: int, values: Mapping[str, float], *, plan: Plan) -> dict[str, float]:
        """Write and return the row of a training step: `values`, and how fast the steps since the last row were."""
        speed = self.speed.values(global_batch=plan.sampler.global_batch)
        left = datetime.timedelta(seconds=round((plan.total - step) / self.speed.steps_per_s()))
        row = {"step": step, "epoch": epoch, **values, **speed}
        self.log.write(row)
        self._track({f"train/{name}": value for name, value in [*values.items(), *speed.items()]}, step=step)
        parts = {name: f"{value:.4g}" for name, value in values.items() if isinstance(value, float)}
        in_bar = {name: value for name, value in parts.items() if name in ("lr", "loss")}
        self.bar.set_postfix({**in_bar, "samples_per_s": f"{speed['samples_per_s']:.4g}", "left": str(left)})
        text = "  ".join(f"{name} {value}" for name, value in parts.items())
        how_fast = "  ".join(form.format(speed[name]) for name, form in UNITS.items() if name in speed)
        logger.info(f"epoch {epoch + 1}  step {step}/{plan.total}  {text}  | {how_fast}  time left {left}")
        self.speed.begin()
        return row

    def report_run(self, about: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Write what a run is, before its first step, and begin the trackers' runs."""
        if about:
            self.log.write({"run": about})
        if not self.trackers:
            self.trackers = [TRACKERS[name](package, self.job_dir, config) for name, package in self.packages.items()]

    def _track(self, scalars: Mapping[str, float], *, step: int) -> None:
        for tracker in (self.events, *self.trackers):
            tracker.write(scalars, step=step)

    def report_pictures(self, name: str, pictures: Pictures, *, step: int) -> None:
        """Show pictures in TensorBoard and the trackers."""
        for tracker in (self.events, *self.trackers):
            tracker.write_images(name, pictures, step=step)

    @property
    def shows_pictures(self) -> bool:
        """Return whether pictures go anywhere."""
        return self.events.writer is not None or bool(self.trackers)

    def report_result(self, result: Mapping[str, Any], *, step: int) -> None:
        """Write what came out of a run."""
        self.log.write({"step": step, "result": result})

    def report_metrics(
        self, split: str, metrics: Mapping[str, Any], *, step: int, epoch: int, speed: Mapping[str, float] | None = None
    ) -> None:
        """Write the metrics of an evaluation, and how fast it was: `seconds` and `samples_per_s`."""
        self.log.write({"split": split, "step": step, "epoch": epoch, "metrics": dict(metrics)})
        if speed:
            self.log.write({"speed": {"split": split, **speed}})
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self._track({f"{split}/{name}": value for name, value in numbers.items()}, step=step)
        parts = [f"{name} {value:.4g}" for name, value in numbers.items()]
        parts += [f"({metrics['note']})"] if "note" in metrics else []
        parts += [f"{speed['samples_per_s']:.4g} images/s"] if speed else []
        logger.info(f"{split}: " + "  ".join(parts))

    def report_mixture(self, sampler: TrainSampler) -> None:
        """Write, before the first step, each training set's number of samples, and its share of the steps or, where
        they are mixed within batches, of the samples.
        """
        shares = sampler.shares.items()
        datasets = {name: {"samples": sampler.lengths[name], "share": share} for name, share in shares}
        self.log.write({"mixture": datasets})
        how = "each batch mixes the samples of" if sampler.is_concat else "each step draws its batch from one of"
        logger.info(f"{how} {len(datasets)} datasets:\n{_table(datasets)}")

    def report_datasets(self, datasets: Mapping[str, Mapping[str, float | None]], *, step: int, epoch: int) -> None:
        """Write each dataset's part in `epoch`: its batches and their mean loss (None without any), or its samples."""
        self.log.write({"step": step, "epoch": epoch, "datasets": datasets})
        numbers = {f"datasets_{key}/{name}": v for name, row in datasets.items() for key, v in row.items()}
        self._track({name: value for name, value in numbers.items() if value is not None}, step=step)
        logger.info(f"epoch {epoch + 1} by dataset:\n{_table(datasets)}")

    def close(self) -> None:
        """Close the event file and the trackers' runs."""
        for tracker in (self.events, *self.trackers):
            tracker.close()
        self.trackers = []


def _table(datasets: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the rows by name as lines of aligned columns below their headers."""
    head = ["dataset", *next(iter(datasets.values()))]
    lines = [head, *([name, *map(_cell, row.values())] for name, row in datasets.items())]
    width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join("  ".join([name.ljust(width), *map(str.rjust, cells, widths)]) for name, *cells in lines)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
