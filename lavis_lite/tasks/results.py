"""Result files and per-sample results: gathered from all ranks, each sample once, in the dataset's order."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common import dist
from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.errors import InputTypeError
from lavis_lite.common.records import StoredImage, printable
from lavis_lite.datasets.protocols import EvalDataset, Samples

logger = logging.getLogger(__name__)

Result = dict[str, Any]


class BatchResults:
    """The results of an evaluation's batches on this rank, as they are computed. This class keeps none of them; that of
    runners/eval_batches.py writes them to a file, and knows those of an evaluation that was interrupted.
    """

    def finished(self) -> list[Result]:
        """Return the results of the batches that the loader leaves out, as they are finished already."""
        return []

    def add(self, results: list[Result]) -> list[Result]:
        """Keep the results of a batch and return them, as they will be read again."""
        return results


def write_json(path: str | Path, value: Any) -> Path:
    r"""Write `value` as UTF-8 JSON, atomically. Lone surrogates, which UTF-8 cannot hold, become `\udXXX`."""
    path = write_text(path, printable(json.dumps(value, ensure_ascii=False, default=_named)))
    logger.info("wrote %s", path)
    return path


def _named(value: Any) -> str:
    """Return an image inside a table as its place; InputTypeError for anything else that JSON does not know."""
    if isinstance(value, StoredImage):
        return str(value)
    raise InputTypeError(f"{type(value).__name__} is not JSON")


def unscored(reason: str) -> dict[str, Any]:
    """Return the metrics of a split that only leaves its result file."""
    return {"agg_metrics": None, "note": f"{reason}: only the result file was written"}


def as_list(value: Any) -> list[Any]:
    """Return a batch's column, a tensor (B) or a list, as a plain list."""
    return value.tolist() if isinstance(value, torch.Tensor) else list(value)


def per_sample(samples: Samples, **columns: Sequence[Any]) -> list[Result]:
    """Return one dict per sample: its `instance_id` and its entry of each column (each of length B)."""
    names = ["instance_id", *columns]
    rows = zip(*map(as_list, [samples["instance_id"], *columns.values()]), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


def split_scores(pairs: Sequence[tuple[str, float]]) -> tuple[list[str], list[float]]:
    """Return the texts and the scores of pairs."""
    return [text for text, _ in pairs], [score for _, score in pairs]


def positions(dataset: EvalDataset) -> dict[str, int]:
    """Return the index of each `instance_id`: the index itself, as a string, or the annotation's `instance_id`."""
    own = {record["instance_id"]: i for i, record in enumerate(dataset.annotation) if "instance_id" in record}
    return own | {str(i): i for i in range(len(dataset))}


def gather(results: Iterable[Result], dataset: EvalDataset) -> list[Result]:
    """Return all ranks' results on every rank, each `instance_id` once (the first one), in the dataset's order.

    A sampler that pads the shards to one length makes some samples appear twice. A warning counts samples without a
    result.
    """
    unique: dict[str, Result] = {}
    for result in dist.gather_objects(list(results)):
        unique.setdefault(result["instance_id"], result)
    missing = len(dataset) - len(unique)
    if missing > 0 and dist.is_main():
        logger.warning("%d of %d samples have no result and do not count in the metrics", missing, len(dataset))
    order = positions(dataset)
    return sorted(unique.values(), key=lambda result: order.get(result["instance_id"], len(order)))
