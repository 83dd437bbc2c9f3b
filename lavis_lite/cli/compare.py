"""The command `lavis-lite table --compare`: two evaluations of the same samples, sample by sample."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.report.jobs import Job, find_jobs
from lavis_lite.tasks.metrics.paired import Paired, paired
from lavis_lite.tasks.predictions import Prediction, read_predictions

COLUMNS = ("split", "metric", "A", "B", "B - A", "95 % interval", "p", "samples")
SCORING = ("accuracy", "join_hyphens", "metric")
"""Settings of tasks that say how a prediction is scored."""
ACCURACIES = ("overall", "acc", "acc1", "true_rate")
"""Names that tasks give to the mean of their samples' `accuracy`."""
RECALL = re.compile(r"(?P<side>txt_|img_)?r(?P<k>\d+)")

Scores = Mapping[str, float]
"""Scores of a metric, in percent, by `instance_id`."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A metric of a split in both runs, in percent."""

    split: str
    metric: str
    result: Paired

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return {"split": self.split, "metric": self.metric, **asdict(self.result)}


def compare(first: Path, second: Path) -> list[Comparison]:
    """Return the comparisons of all metrics that have a score per sample, of all splits that both runs evaluated.

    Raises InputError if the runs have other tasks, ways of scoring, samples or references, or no such metric.
    """
    a, b = only_job(first), only_job(second)
    if a.folder.resolve() == b.folder.resolve():
        raise InputError(f"--compare: {first} and {second} are the same job; name two")
    if a.task != b.task:
        raise InputError(f"--compare: {first} is of the task {a.task}, {second} of {b.task}: name runs of one task")
    kind = registry.get_task_class(a.task)
    for rule in (field for field in fields(kind) if field.name in SCORING):
        values = [job.config["run"].get(rule.name, rule.default) for job in (a, b)]
        if values[0] != values[1]:
            raise InputError(
                f"--compare: scored by other rules: run.{rule.name} is {values[0]} and {values[1]}; score both alike"
            )
    paths = [job.predictions() for job in (a, b)]
    for job, own in zip((a, b), paths, strict=True):
        if not own:
            raise InputError(f"--compare: {job.folder} has no predictions/*.jsonl: evaluate it again")
    splits = [split for split in paths[0] if split in paths[1]]
    if not splits:
        names = " and ".join(", ".join(own) for own in paths)
        raise InputError(f"--compare: the runs evaluated other splits: {names}; evaluate both on the same one")
    found = [one for split in splits for one in compare_split(a, b, split, (paths[0][split], paths[1][split]))]
    if not found:
        raise InputError(f"--compare: no sample of {', '.join(splits)} has a score: evaluate on a split with answers")
    return found


def only_job(folder: Path) -> Job:
    """Return the job of a folder. InputError if there are several."""
    jobs = find_jobs(folder)
    if len(jobs) > 1:
        names = ", ".join(job.name for job in jobs[:5])
        raise InputError(
            f"--compare: {folder} has {len(jobs)} jobs: name one of them, e.g. {folder / jobs[-1].name} ({names})"
        )
    return jobs[0]


def compare_split(a: Job, b: Job, split: str, paths: tuple[Path, Path]) -> Iterator[Comparison]:
    """Yield the comparisons of a split's metrics."""
    first, second = map(by_id, paths)
    check_same(first, second, split, paths)
    metrics = [job.final_of(split).metrics for job in (a, b)]
    if metrics[0].get("tokenizer") != metrics[1].get("tokenizer"):
        names = " and ".join(str(own.get("tokenizer")) for own in metrics)
        raise InputError(f"--compare: captions of {split} were scored by the tokenizers {names}; score both alike")
    scores = [dict(scores_of(job, rows, own)) for job, rows, own in zip((a, b), (first, second), metrics, strict=True)]
    for name in scores[0].keys() & scores[1].keys():
        missing = scores[0][name].keys() ^ scores[1][name].keys()
        if missing:
            counts = f"{len(missing):,} samples have a score in one run only, e.g. {min(missing)}"
            raise InputError(f"--compare: {name} of {split}: {counts}; score both alike")
    for name in (name for name in scores[0] if name in scores[1]):
        ids = list(scores[0][name])
        groups = [tuple(first[key]["images"]) or key for key in ids]
        values = [[own[name][key] for key in ids] for own in scores]
        yield Comparison(split=split, metric=name, result=paired(values[0], values[1], groups))


def by_id(path: Path) -> dict[str, Prediction]:
    """Return the predictions of a file by id. InputError for an id that comes twice."""
    found: dict[str, Prediction] = {}
    for number, row in enumerate(read_predictions(path), start=1):
        if row["instance_id"] in found:
            problem = f"sample {row['instance_id']} has a prediction on an earlier line too"
            raise InputError(f"{path}:{number}: {problem}; evaluate again")
        found[row["instance_id"]] = row
    return found


def check_same(
    first: Mapping[str, Prediction], second: Mapping[str, Prediction], split: str, paths: tuple[Path, Path]
) -> None:
    """Raise InputError unless two runs predicted the same samples, with the same references."""
    common = [key for key in first if key in second]
    if len(common) < max(len(first), len(second)):
        counts = f"{paths[0]} has {len(first):,} and {paths[1]} has {len(second):,}, {len(common):,} ids in common"
        raise InputError(f"--compare: other samples of {split}: {counts}; evaluate both on the same ones")
    for key in common:
        pair = [
            (row.get("references"), [Path(image).name for image in row["images"]]) for row in (first[key], second[key])
        ]
        if pair[0] != pair[1]:
            raise InputError(
                f"--compare: sample {key} of {split} has other images or references in {paths[1]} than in {paths[0]}; "
                "evaluate both on the same data"
            )


def scores_of(job: Job, rows: Mapping[str, Prediction], metrics: Mapping[str, Any]) -> Iterator[tuple[str, Scores]]:
    """Yield name and scores of each metric that is a mean over samples, as the run names it."""
    recalls = [match for match in map(RECALL.fullmatch, metrics) if match]
    for match in recalls:
        of = {"txt_": "image ", "img_": "text "}.get(match["side"])
        asked = {key: row for key, row in rows.items() if (key.startswith(of) if of else "rank" in row)}
        ranks = {key: row.get("rank", float("inf")) for key, row in asked.items()}  # those below `k_test` have none
        yield match[0], {key: 100.0 * (rank <= int(match["k"])) for key, rank in ranks.items()}
    names = dict.fromkeys(name for row in rows.values() for name in row.get("metrics", {}))
    for name in names if not any(match["side"] for match in recalls) else ():
        own = {key: row["metrics"][name] for key, row in rows.items() if name in row.get("metrics", {})}
        shown = next((one for one in ACCURACIES if one in metrics), name) if name == "accuracy" else name
        yield shown, {key: job.percent(name, value) for key, value in own.items()}
    if "mrr" in metrics:
        yield "mrr", {key: 100 / row["rank"] for key, row in rows.items() if "rank" in row}


def lines(found: Sequence[Comparison], runs: Sequence[Path]) -> list[str]:
    """Return the lines of the table: means with standard errors, in percent."""
    cells = [COLUMNS, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [f"A: {runs[0]}", f"B: {runs[1]}", *table]


def _cells(one: Comparison) -> tuple[str, ...]:
    result = one.result
    low, high = result.interval
    counted = f"{result.num_samples:,}"
    if result.num_groups < result.num_samples:
        counted += f" of {result.num_groups:,} images"
    means = (_with_error(result.a, result.error_a), _with_error(result.b, result.error_b))
    return (
        one.split,
        one.metric,
        *means,
        f"{result.difference:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        f"{result.p_value:.4f}",
        counted,
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
