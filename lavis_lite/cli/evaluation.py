"""Write `evaluation.json` into the job's folder: metrics, verdict and provenance of an evaluation."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lavis_lite.cli import verdict
from lavis_lite.cli.provenance import provenance
from lavis_lite.cli.published import EVALUATION
from lavis_lite.common.config.config import Config
from lavis_lite.nn.fingerprint import weights_digest
from lavis_lite.runners.runner import Runner
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.results import write_json

logger = logging.getLogger(__name__)


def conclude(
    cfg: Config,
    runner: Runner,
    results: Mapping[str, Mapping[str, Any]],
    references: verdict.References,
    *,
    weights: Mapping[str, torch.Tensor],
) -> list[verdict.Row]:
    """Log the verdict, write `evaluation.json`, and return the verdict's rows.

    `results` are metrics by split, `references` what the recipe's values were measured with, and
    `weights` the model's state, without frozen parts that have a source of their own. Called on rank 0 only.
    """
    rows = verdict.judge(cfg, results, runner.num_samples, references)
    if rows:
        logger.info("%s", "\n".join(["published values", *verdict.table(rows)]))
    content = {
        "metrics": results,
        "percent": {split: verdict.in_percent(cfg, metrics) for split, metrics in results.items()},
        "intervals": {split: intervals(metrics) for split, metrics in results.items()},
        "standard_errors": {split: standard_errors(metrics) for split, metrics in results.items()},
        "num_samples": runner.num_samples,
        "verdict": verdict.to_json(rows),
        "provenance": provenance(cfg, runner) | {"weights_sha256": weights_digest(weights)},
    }
    write_json(runner.job_dir / EVALUATION, content)
    return rows


def intervals(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of every mean, in the metric's unit, by name with dots."""
    return {name: mean.interval() for name, mean in means(metrics)}


def standard_errors(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the standard error of every mean over several samples, in the metric's unit, by name with dots."""
    found = {name: mean.standard_error() for name, mean in means(metrics)}
    return {name: error for name, error in found.items() if error is not None}


def means(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mean]]:
    """Yield the means of metrics and of tables in them, by name with dots."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from means(value, f"{prefix}{name}.")
        elif isinstance(value, Mean):
            yield f"{prefix}{name}", value
