"""One page about a job, or about several with an index: gathers what the template shows, and writes the file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.page.render import plural, render
from lavis_lite.report import tables
from lavis_lite.report.cards import Card, Confusion, by_kind, card_of, confusion, near_misses
from lavis_lite.report.curves import figures
from lavis_lite.report.figures import Figure
from lavis_lite.report.jobs import Job
from lavis_lite.tasks.predictions import Prediction, drawn, read_predictions, worst

CLASSIFICATIONS = ("multimodal_classification", "zero_shot_classification")
NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class SplitView:
    """The predictions of a split."""

    split: str
    note: str
    sample: list[Card]
    worst: list[Card]
    near: list[Card]
    confusion: Confusion | None
    breakdowns: list[tuple[str, list[tables.Group]]]


@dataclass(frozen=True, kw_only=True)
class JobView:
    """Contents of a job's page."""

    job: Job
    anchor: str
    lead: list[str]
    metrics: tables.Grid
    published: list[tables.Published]
    figures: list[Figure]
    splits: list[SplitView]
    throughput: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    config: str


@dataclass(frozen=True, kw_only=True)
class Extra:
    """A caller's additions to a page: its title, an introduction, and a table of figures."""

    title: str = ""
    intro: str = ""
    table: Sequence[tuple[str, str]] = field(default_factory=list)
    names: Mapping[str, str] = field(default_factory=dict)
    """Titles of jobs, by the name of their folder; others are named by their folder."""
    with_predictions: frozenset[str] | None = None
    """Jobs whose predictions are shown; None: all."""


def write_report(jobs: Sequence[Job], out: Path, *, samples: int, seed: int, extra: Extra | None = None) -> Path:
    """Write the page of jobs; of several the index comes first. `samples` predictions of each split are drawn."""
    extra = extra or Extra()
    number = samples if len(jobs) == 1 else max(1, samples // 2)
    views = [job_view(job, f"job{n}", number, seed, extra) for n, job in enumerate(jobs, start=1)]
    title = extra.title or (f"{jobs[0].name}: {jobs[0].task}" if len(jobs) == 1 else plural(len(jobs), "job"))
    names, lines = tables.side_by_side(list(jobs))
    text = render(
        "report.html",
        package="lavis_lite.report",
        title=title,
        extra=extra,
        views=views,
        columns=names,
        lines=[(view, values) for view, (_, values) in zip(views, lines, strict=True)],
        seed=seed,
    )
    return write_text(out, text)


def job_view(job: Job, anchor: str, samples: int, seed: int, extra: Extra) -> JobView:
    """Return what the page shows of a job."""
    has_predictions = extra.with_predictions is None or job.name in extra.with_predictions
    files = job.predictions() if has_predictions else {}
    return JobView(
        job=job,
        anchor=anchor,
        lead=lead(job),
        metrics=tables.metric_grid(job),
        published=tables.published_rows(job),
        figures=figures(job),
        splits=[split_view(job, split, read_predictions(path), samples, seed) for split, path in shown(job, files)],
        throughput=tables.throughput(job),
        facts=tables.facts(job),
        config=yaml.safe_dump(job.config, sort_keys=False, allow_unicode=True),
    )


def shown(job: Job, files: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """Return the splits whose predictions are shown: the tested ones, else all."""
    last = {one.split for one in job.final() if one.split in files}
    tested = [split for split in job.config["run"].get("test_splits", []) if split in last]
    names = [name for name in files if any(name == split or name.endswith(f"_{split}") for split in tested)]
    return [(name, files[name]) for name in names or sorted(last)]


def lead(job: Job) -> list[str]:
    """Return sentences about what was done and what came out."""
    kind = "Evaluation" if job.is_evaluation else "Training"
    lines = [f"{kind} of {job.model} for {job.task} on {', '.join(job.config.get('datasets', {}))}."]
    planned, done = job.named("run").get("steps"), job.steps[-1]["step"] if job.steps else 0
    if done:
        lines.append(f"{done:,} of {plural(planned, 'step')}." if planned else f"{plural(done, 'step')}.")
    scored = [one for one in job.final() if one.metrics.get("agg_metrics") is not None]
    lines += [f"agg_metrics of {one.split}: {one.metrics['agg_metrics']:.4g}." for one in scored[-2:]]
    if not job.has_ended:
        lines.append("The run has not ended: this is what it has done so far.")
    elif planned and 0 < done < planned:
        lines.append("It ended early, as later validations were not better.")
    return lines


def split_view(job: Job, split: str, rows: Sequence[Prediction], samples: int, seed: int) -> SplitView:
    """Return what the page shows of a split's predictions."""
    sample, lowest = drawn(rows, samples, seed=seed), worst(rows, max(1, samples // 2), seed=seed)
    near = near_misses(rows, max(1, samples // 2), seed=seed)
    return SplitView(
        split=split,
        note=f"{len(sample):,} of {plural(len(rows), 'prediction')}, drawn at random with seed {seed}",
        sample=[card_of(row, job.percent) for row in sample],
        worst=[card_of(row, job.percent) for row in lowest],
        near=[card_of(row, job.percent, with_candidates=True) for row in near],
        confusion=confusion(rows) if job.task in CLASSIFICATIONS else None,
        breakdowns=list(tables.breakdowns(job, job.final_of(split), dict(by_kind(rows)))),
    )
