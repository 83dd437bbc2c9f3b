"""Result files and per-sample results: gathered from all ranks, each sample once, in the dataset's order."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common import dist
from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.errors import UnknownNameError
from lavis_lite.common.records import printable

logger = logging.getLogger(__name__)

Result = dict[str, Any]


def write_json(path: str | Path, value: Any) -> Path:
    r"""Write `value` as UTF-8 JSON, aside first and then renamed, so that no half file is ever seen.

    What UTF-8 cannot hold, lone surrogates, is written as JSON's own `\udXXX`.
    """
    path = write_text(path, printable(json.dumps(value, ensure_ascii=False)))
    logger.info("wrote %s", path)
    return path


def as_list(value: Any) -> list[Any]:
    """A batch's column, tensor (B) or list, as a plain list."""
    return value.tolist() if isinstance(value, torch.Tensor) else list(value)


def per_sample(samples: dict[str, Any], **columns: Sequence[Any]) -> list[Result]:
    """One dict a sample of the batch: its `instance_id` and its entry of each column (each of length B)."""
    if "instance_id" not in samples:
        raise UnknownNameError(
            "the batch has no 'instance_id': the dataset's samples need one, unique within the split"
        )
    names = ["instance_id", *columns]
    return [
        dict(zip(names, row, strict=True))
        for row in zip(as_list(samples["instance_id"]), *map(as_list, columns.values()), strict=True)
    ]


def gather(results: Iterable[Result], dataset: Any) -> list[Result]:
    """All ranks' results, on every rank, each `instance_id` once, in the dataset's order.

    An `instance_id` is a sample's index, as in all datasets here, or the field of this name in `dataset.annotation`.

    A sampler that pads the shards to one length makes some samples appear twice; the first one counts. A sample without
    a result is warned about, by number.
    """
    unique: dict[str, Result] = {}
    for result in dist.gather_objects(list(results)):
        unique.setdefault(result["instance_id"], result)
    missing = len(dataset) - len(unique)
    if missing > 0 and dist.is_main():
        logger.warning("%d of %d samples have no result and do not count in the metrics", missing, len(dataset))
    order = {record.get("instance_id"): i for i, record in enumerate(getattr(dataset, "annotation", []))}
    order |= {str(i): i for i in range(len(dataset))}
    return sorted(unique.values(), key=lambda result: order.get(result["instance_id"], len(order)))
