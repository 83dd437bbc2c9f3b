"""The figures of a training: losses, metrics of every validation, learning rate, speed."""

import math
from collections.abc import Iterator
from typing import TypeGuard

from lavis_lite.report.figures import Figure, Points, curve
from lavis_lite.report.jobs import Job

MAX_METRICS = 8
UNITS = {
    "lr": "learning rate",
    "samples_per_s": "images per second",
    "tokens_per_s": "tokens per second",
    "data_wait": "share of the time",
    "mfu": "share of the peak",
    "max_memory_gb": "GB",
    "max_resident_gb": "GB",
    "loss": "loss",
}
TITLES = {
    "lr": "Learning rate",
    "samples_per_s": "Speed of training",
    "tokens_per_s": "Tokens read",
    "data_wait": "Waiting for data",
    "mfu": "Model FLOPs utilisation",
    "max_memory_gb": "Memory of the accelerator",
    "max_resident_gb": "Main memory",
    "grad_norm": "Norm of the gradient",
}
NOT_DRAWN = ("step", "epoch", "unreadable")


def figures(job: Job) -> list[Figure]:
    """Return all curves of a job; none of an evaluation, which has no steps."""
    if not job.steps:
        return []
    return [*losses(job), *validations(job), *others(job)]


def losses(job: Job) -> Iterator[Figure]:
    """Yield the loss in training and, where it is measured, in validation; and its parts, if there are several."""
    names = [name for name in job.steps[-1] if name.startswith("loss")]
    parts = {name: points_of(job, name) for name in names}
    validation = {f"{split}": points for split, points in metric_points(job, "loss").items()}
    if points := parts.pop("loss", []):
        yield _curve(job, "Loss", {"training": points, **validation}, label="loss")
    if len(parts) > 1:
        shown = {name.removeprefix("loss_"): points for name, points in parts.items() if points}
        yield _curve(job, "Parts of the loss", shown, label="loss")


def validations(job: Job) -> Iterator[Figure]:
    """Yield each metric of the evaluations, without those that repeat another."""
    names = {name: None for one in job.evaluations for name, value in one.metrics.items() if is_number(value)}
    own = [name for name in names if not name.startswith("loss") and name != "agg_metrics"]
    drawn: list[dict[str, Points]] = []
    for name in own or (["agg_metrics"] if "agg_metrics" in names else []):
        series = metric_points(job, name)
        if series and series not in drawn and len(drawn) < MAX_METRICS:
            drawn.append(series)
            yield _curve(job, name, series, label=name)


def others(job: Job) -> Iterator[Figure]:
    """Yield the learning rate, the speed, and what else every row of the log has."""
    for name, value in job.steps[-1].items():
        if name in NOT_DRAWN or name.startswith("loss") or not is_number(value):
            continue
        if points := points_of(job, name):
            yield _curve(job, TITLES.get(name, name), {name: points}, label=UNITS.get(name, name))


def points_of(job: Job, name: str) -> Points:
    """Return a number of the training's rows by step."""
    return [(row["step"], row[name]) for row in job.steps if is_number(row.get(name))]


def metric_points(job: Job, name: str) -> dict[str, Points]:
    """Return a metric by split, in percent where papers have it so; only of the steps of this training."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in job.evaluations:
        if is_number(value := one.metrics.get(name)):
            found.setdefault(one.split, []).append((one.step, job.percent(name, value)))
    return {split: sorted(points) for split, points in found.items()}


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve(job: Job, title: str, series: dict[str, Points], *, label: str) -> Figure:
    last = job.steps[-1]["step"]
    return curve(title, series, label=label, last_step=last, steps_per_epoch=job.steps_per_epoch)
