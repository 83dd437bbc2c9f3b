"""Metrics of candidates ranked by their loss, in percent: mean reciprocal rank and area under the ROC curve.

Equal losses keep the order of the candidates, as a stable sort does. Equal scores of a positive and a negative sample
count half in the area, as in scikit-learn's `roc_auc_score`.
"""

import math
from collections.abc import Sequence

import numpy as np

from lavis_lite.common.errors import InputError
from lavis_lite.tasks.metrics.mean import Mean


def rank_of(losses: Sequence[float], right: int) -> int:
    """Return the rank, from 1, of the candidate `right`, lowest loss first. InputError if a loss is not a number."""
    if any(math.isnan(loss) for loss in losses):
        raise InputError(f"the losses {list(losses)} are not all numbers: they have no order")
    return 1 + sum((loss, index) < (losses[right], right) for index, loss in enumerate(losses))


def mean_reciprocal_rank(ranks: Sequence[int]) -> Mean:
    """Return 100 times the mean of 1/rank; ranks count from 1 (Visual Dialog's MRR)."""
    return Mean(100 * sum(1 / rank for rank in ranks) / len(ranks), [100 / rank for rank in ranks])


def roc_auc(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Return 100 times the share of pairs of a positive and a negative sample whose positive one scores higher.

    Raises InputError if there are only positive or only negative samples, or a score is not a number.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(is_positive, dtype=bool)
    if np.isnan(values).any():
        raise InputError(f"score {int(np.isnan(values).argmax())} is not a number: the scores have no order")
    if positive.all() or not positive.any():
        counts = f"{int(positive.sum())} positive and {int((~positive).sum())} negative samples"
        raise InputError(f"the area under the ROC curve needs both kinds; there are {counts}")
    negatives = np.sort(values[~positive])
    below, upto = (np.searchsorted(negatives, values[positive], side=side) for side in ("left", "right"))
    return float(100 * np.mean(below + upto) / (2 * len(negatives)))
