"""Visual Dialog's metrics (Das et al. 2017; the challenge's NDCG of 2018): the ranks of an answer among a hundred.

Options count by their position, as in the challenge's script: equal texts are two options.
"""

import math
from collections.abc import Sequence

import numpy as np

from lavis_lite.common.errors import InputError
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.metrics.ranking import mean_reciprocal_rank

RECALLS = (1, 5, 10)


def ranks_of(losses: Sequence[float]) -> list[int]:
    """Return the rank, from 1, of each option, lowest loss first; equal losses keep the order of the options."""
    if any(math.isnan(loss) for loss in losses):
        raise InputError(f"the losses {list(losses)} are not all numbers: they have no order")
    ranks = np.empty(len(losses), dtype=np.int64)
    ranks[np.argsort(np.asarray(losses, dtype=np.float64), kind="stable")] = np.arange(1, len(losses) + 1)
    return ranks.tolist()


def sparse_metrics(ranks: Sequence[int]) -> dict[str, Mean]:
    """Return `mrr` and `r1`, `r5`, `r10` in percent, and `mean_rank`, of the right options' ranks (from 1)."""
    found = {"mrr": mean_reciprocal_rank(ranks)}
    for k in RECALLS:
        hits = [100.0 * (rank <= k) for rank in ranks]
        found[f"r{k}"] = Mean(sum(hits) / len(hits), hits)
    return found | {"mean_rank": Mean(sum(ranks) / len(ranks), list(map(float, ranks)))}


def ndcg(ranks: Sequence[Sequence[int]], relevance: Sequence[Sequence[float]], /) -> Mean:
    """Return the normalised discounted cumulative gain, in percent, over the rounds with dense annotations.

    Both have one row per round, with a rank (from 1) and a relevance (0 to 1: the share of people who found the option
    right) for each option. The gain counts the first K ranks, K being the number of options with any relevance.
    Raises InputError for rows of different lengths and for a round without a relevant option.
    """
    values = []
    for number, (own, relevant) in enumerate(zip(ranks, relevance, strict=True)):
        if len(own) != len(relevant):
            raise InputError(f"round {number}: {len(own)} options are ranked, but {len(relevant)} have a relevance")
        gains = np.asarray(relevant, dtype=np.float64)
        k = int(np.count_nonzero(gains))
        if not k:
            raise InputError(f"round {number}: no option has any relevance, so its gain cannot be normalised")
        discounts = 1 / np.log2(np.arange(k) + 2)
        ranked = gains[np.argsort(np.asarray(own), kind="stable")][:k]
        values.append(100 * float(ranked @ discounts / (np.sort(gains)[::-1][:k] @ discounts)))
    return Mean(sum(values) / len(values), values)
