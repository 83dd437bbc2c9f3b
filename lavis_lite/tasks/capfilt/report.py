"""Figures and a page about the texts that the task `capfilt` wrote; one pass over the shards, in constant memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lavis_lite.datasets.readers.capfilt import finished_manifest, read_shard
from lavis_lite.tasks.capfilt.shards import Shards


def summarise(shards: Shards, *, seed: int, title: str) -> dict[str, Any]:
    """Return the counts and shares of kept texts by source."""
    seen: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for name in finished_manifest(shards.manifest)["shards"]:
        for record in read_shard(shards.folder / name):
            seen[record["source"]] += 1
            kept[record["source"]] += record["kept"]
    metrics: dict[str, Any] = {f"kept_{source}": 100 * kept[source] / seen[source] for source in sorted(seen)}
    return {**metrics, "num_texts": seen.total(), "num_kept": kept.total(), "agg_metrics": None}
