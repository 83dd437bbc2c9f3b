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
TOGETHER: dict[str, tuple[str, ...]] = {
    "Accuracies of contrast and matching": ("acc_", "chance_"),
    "Similarities within a batch": ("cos_",),
}
"""Numbers of the log, by the start of their names, that share a figure."""
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
    """Yield the metrics of several evaluations, without those that repeat another; `txt_r1`, `txt_r5` ... share one."""
    names = {name: None for one in job.evaluations for name, value in one.metrics.items() if is_number(value)}
    own = [name for name in names if not name.startswith("loss") and name != "agg_metrics"]
    drawn: list[dict[str, Points]] = []
    families: dict[str, dict[str, dict[str, Points]]] = {}
    for name in own or (["agg_metrics"] if "agg_metrics" in names else []):
        series = {split: points for split, points in metric_points(job, name).items() if len(points) > 1}
        if series and series not in drawn:
            drawn.append(series)
            families.setdefault(name.rstrip("0123456789"), {})[name] = series
    for family, members in list(families.items())[:MAX_METRICS]:
        yield _curve(job, ", ".join(members), _labelled(members), label=family.rstrip("_@"))


def others(job: Job) -> Iterator[Figure]:
    """Yield the learning rate, the speed, and what else every row of the log has."""
    names = [name for name, value in job.steps[-1].items() if is_number(value) and not name.startswith("loss")]
    found = {name: points_of(job, name) for name in names if name not in NOT_DRAWN}
    curves = {name: points for name, points in found.items() if len(points) > 1}
    for title, starts in TOGETHER.items():
        shared = {name: curves.pop(name) for name in names if name in curves and name.startswith(starts)}
        if shared:
            yield _curve(job, title, shared, label=title.lower())
    for name, points in curves.items():
        yield _curve(job, TITLES.get(name, name), {name: points}, label=UNITS.get(name, name))


def _labelled(members: dict[str, dict[str, Points]]) -> dict[str, Points]:
    """Return all series of metrics, by split, by metric, or by both where both differ."""
    if len(members) == 1:
        return next(iter(members.values()))
    splits = {split for series in members.values() for split in series}
    return {
        name if len(splits) == 1 else f"{split} {name}": points
        for name, series in members.items()
        for split, points in series.items()
    }


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
