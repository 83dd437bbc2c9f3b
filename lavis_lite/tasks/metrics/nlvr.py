"""NLVR2's consistency (Suhr et al. 2019): the share of sentences judged right about all of their image pairs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lavis_lite.tasks.metrics.mean import Mean


def consistency(records: Sequence[Mapping[str, Any]], hits: Sequence[float]) -> Mean:
    """Return, in percent, how many sentences have only hits. A record's sentence is known by its `identifier`, which is
    <split>-<set>-<pair>-<sentence>, or else by its text.
    """
    groups: dict[Any, list[float]] = defaultdict(list)
    for record, hit in zip(records, hits, strict=True):
        parts = str(record.get("identifier", "")).split("-")
        groups[(parts[0], parts[1], parts[3]) if len(parts) == 4 else record["sentence"]].append(hit)
    values = [100.0 * all(own) for own in groups.values()]
    return Mean(sum(values) / len(values), values)
