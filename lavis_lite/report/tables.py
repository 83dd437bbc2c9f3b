"""The tables of a report: metrics with published values, break-downs by kind, throughput, and how the run was made."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lavis_lite.report.curves import is_number
from lavis_lite.report.jobs import Evaluation, Job

MAIN = (
    "CIDEr",
    "Bleu_4",
    "true_rate",
    "overall",
    "accuracy",
    "acc",
    "acc1",
    "txt_r1",
    "img_r1",
    "mrr",
    "auc",
    "auc_itm",
)
"""Metrics by which jobs are compared, at most `MAX_MAIN` of each; of other tasks the first ones."""
MAX_MAIN = 3
MAX_SPLITS = 5


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric's value, with its 95 % interval where it is known."""

    value: str = ""
    interval: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Metrics of several evaluations: one of the two in rows, the other in columns."""

    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def metric_grid(job: Job) -> Grid:
    """Return the metrics of each split's last evaluation, and of its best one where that is another.

    Metrics are rows, or columns where there are many splits.
    """
    shown_ones: dict[str, Evaluation] = {}
    for one in job.final():
        best = job.best(one.split)
        if best is not None and best.step != one.step:
            shown_ones[f"{where(job, best)} (best)"] = best
        shown_ones[where(job, one)] = one
    names = list(dict.fromkeys(name for one in shown_ones.values() for name, _ in numbers(one.metrics)))
    table = {label: {name: _cell(job, one, name) for name in names} for label, one in shown_ones.items()}
    if len(table) > MAX_SPLITS:
        rows = [(label, [cells[name] for name in names]) for label, cells in table.items()]
        return Grid(corner="split", columns=names, rows=rows)
    return Grid(corner="metric", columns=[*table], rows=[(n, [cells[n] for cells in table.values()]) for n in names])


def _cell(job: Job, one: Evaluation, name: str) -> Cell:
    value = dict(numbers(one.metrics)).get(name)
    if value is None:
        return Cell()
    is_final = one == job.final_of(one.split)
    bounds = job.evaluation.get("intervals", {}).get(one.split, {}).get(name) if is_final else None
    interval = "" if bounds is None else " to ".join(shown(job.percent(name, bound)) for bound in bounds)
    return Cell(value=shown(job.percent(name, value)), interval=interval)


def where(job: Job, one: Evaluation) -> str:
    """Return the split of an evaluation, with its step in a training."""
    return one.split if job.is_evaluation or not one.step else f"{one.split}, step {one.step:,}"


def numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of metrics, without tables, and `agg_metrics` only where it is not another number again."""
    plain = {name: value for name, value in metrics.items() if is_number(value)}
    others = [value for name, value in plain.items() if name != "agg_metrics"]
    yield from ((name, value) for name, value in plain.items() if name != "agg_metrics" or value not in others)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published value, what was measured here, and the verdict; values are in percent."""

    name: str
    here: str
    published: str
    difference: str
    verdict: str
    reasons: str
    source: str


def published_rows(job: Job) -> list[Published]:
    """Return the published values that the recipe expects, as the evaluation judged them."""
    return [
        Published(
            name=f"{row['split']} {row['metric']}",
            here=shown(row["here"]),
            published=str(row["published"]),
            difference="" if row["difference"] is None else f"{row['difference']:+.2f}",
            verdict=row["verdict"],
            reasons="; ".join(row["reasons"]),
            source=row["source"],
        )
        for row in job.evaluation.get("verdict", [])
    ]


def shown(value: float | None) -> str:
    """Return a number as a table has it."""
    if value is None:
        return ""
    return f"{value:,.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:.1g}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """A line of a break-down; `share` is the bar's length, of 1."""

    name: str
    value: str
    share: float
    count: str


def breakdowns(job: Job, one: Evaluation, counts: Mapping[str, Counter[str]]) -> Iterator[tuple[str, list[Group]]]:
    """Yield each table within an evaluation's metrics; `counts` are numbers of samples by kind and value."""
    seen: list[dict[str, Any]] = []
    for name, table in one.metrics.items():
        own = {key: value for key, value in table.items() if is_number(value)} if isinstance(table, dict) else {}
        if not own or own in seen:
            continue
        seen.append(own)
        kind = name.removeprefix("per_")
        values = {key: job.percent(key, value) for key, value in own.items()}
        most = max(100.0, *values.values())
        lines = [
            Group(
                name=key,
                value=shown(value),
                share=max(0.0, value / most),
                count=f"{counts[kind][key]:,}" if kind in counts else "",
            )
            for key, value in values.items()
        ]
        yield name.replace("per_", "by ").replace("_", " "), lines


def throughput(job: Job) -> list[tuple[str, str]]:
    """Return how fast a run was, by name."""
    found = []
    speeds = [row["samples_per_s"] for row in job.steps if is_number(row.get("samples_per_s"))]
    if speeds:
        found.append(("training", f"{statistics.median(speeds):,.1f} images/s (median of {len(speeds):,} rows)"))
    for split, speed in {row["speed"]["split"]: row["speed"] for row in job.rows if "speed" in row}.items():
        found.append(
            (f"evaluation of {split}", f"{speed['samples_per_s']:,.1f} images/s, {duration(speed['seconds'])}")
        )
    memory = [row["max_memory_gb"] for row in job.steps if is_number(row.get("max_memory_gb"))]
    if memory:
        found.append(("largest memory of the accelerator", f"{max(memory):.1f} GB"))
    if is_number(seconds := job.named("result").get("seconds")):
        found.append(("whole run", duration(seconds)))
    return found


def duration(seconds: float) -> str:
    """Return a time as `1:23:45`, or in seconds if it is short."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def facts(job: Job) -> list[tuple[str, str]]:
    """Return how the run was made: recipe, command, date, versions, device."""
    known = job.provenance
    found = [("folder", str(job.folder.absolute())), ("task", job.task), ("model", job.model)]
    found.append(("data", ", ".join(job.config.get("datasets", {}))))
    names = {"parameters": "parameters", "trainable": "trainable", "recipe": "recipe", "weights": "weights"}
    names |= {"device": "device", "processes": "processes", "precision": "precision", "seed": "seed"}
    names |= {"steps": "steps", "date": "date", "weights_sha256": "SHA-256 of the weights"}
    for key, name in names.items():
        if known.get(key) is not None:
            value = known[key]
            found.append((name, f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)))
    if "command" in known:
        found.append(("command", " ".join(map(str, known["command"]))))
    if "versions" in known:
        found.append(("versions", ", ".join(f"{name} {number}" for name, number in known["versions"].items())))
    return found


def side_by_side(jobs: list[Job]) -> tuple[list[str], list[tuple[Job, list[str]]]]:
    """Return the names of metrics, and each job with its values of them, empty where it has none."""
    values = {job.name: {f"{one.split} {name}": v for one, name, v in _main(job)} for job in jobs}
    names = list(dict.fromkeys(name for own in values.values() for name in own))
    return names, [(job, [values[job.name].get(name, "") for name in names]) for job in jobs]


def _main(job: Job) -> Iterator[tuple[Evaluation, str, str]]:
    """Yield the metrics to compare jobs by: the main ones of the test splits, else of all splits."""
    final = job.final()
    tested = [one for one in final if one.split in job.config["run"].get("test_splits", [])] or final
    for one in tested:
        found = dict(numbers(one.metrics))
        names = [name for name in MAIN if name in found] or list(found)
        for name in names[:MAX_MAIN]:
            yield one, name, shown(job.percent(name, found[name]))
