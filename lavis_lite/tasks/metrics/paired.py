"""The difference of a metric between two evaluations of the same samples, and whether chance explains it.

Samples of one image (questions, captions to find) are not independent: groups of samples are drawn and flipped as one.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lavis_lite.tasks.metrics.mean import MAX_DRAWN, bootstrap_interval

NUM_FLIPS = 10_000


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Means of two evaluations over the same samples, in the scores' unit; the difference is that of `b` minus `a`."""

    a: float
    b: float
    error_a: float | None
    """Standard errors; None of a single group."""
    error_b: float | None
    difference: float
    error: float | None
    interval: tuple[float, float]
    """95 % interval of the difference, by the paired bootstrap."""
    p_value: float
    """Two-sided, of the sign-flip permutation test: how often a difference at least this large arises if each group's
    two sets of scores are exchanged at random."""
    num_samples: int
    num_groups: int


def paired(a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable]) -> Paired:
    """Return the comparison of the scores `a` and `b` (N), which are of the same samples in the same order.

    `groups` (N) has the same value for samples that are not independent. The random numbers are fixed.
    """
    assert len(a) == len(b) == len(groups) > 0, (len(a), len(b), len(groups))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = np.array([numbers[group] for group in groups])
    first, second, sizes = (np.bincount(index, weights=np.asarray(scores)) for scores in (a, b, np.ones(len(a))))
    sums = np.bincount(index, weights=np.asarray(b) - np.asarray(a))
    return Paired(
        a=float(first.sum() / len(a)),
        b=float(second.sum() / len(a)),
        error_a=standard_error(first, sizes),
        error_b=standard_error(second, sizes),
        difference=float(sums.sum() / len(a)),
        error=standard_error(sums, sizes),
        interval=bootstrap_interval(sums, sizes),
        p_value=sign_flip(sums),
        num_samples=len(a),
        num_groups=len(sizes),
    )


def standard_error(sums: np.ndarray, sizes: np.ndarray) -> float | None:
    """Return the standard error of `sums.sum() / sizes.sum()` over independent groups (G); None of a single group.

    Of groups of one sample each it is the standard deviation divided by the root of their number.
    """
    number = len(sums)
    if number < 2:
        return None
    rest = sums - sums.sum() / sizes.sum() * sizes
    return float(np.sqrt((rest**2).sum() * number / (number - 1)) / sizes.sum())


def sign_flip(sums: np.ndarray) -> float:
    """Return the two-sided p-value of the groups' differences (G): exact if there are few that differ from 0, else by
    `NUM_FLIPS` random flips, the observed signs counting as one of them.
    """
    sizes, counts = np.unique(np.abs(sums[sums != 0]), return_counts=True)
    least = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # sums in another order differ in their last bits
    if 2 ** min(counts.sum(), 64) <= NUM_FLIPS:
        signs = 1 - 2 * ((np.arange(2 ** counts.sum())[:, None] >> np.arange(counts.sum())) & 1)
        return float(np.mean(np.abs(signs @ np.repeat(sizes, counts)) >= least))
    random, found = np.random.default_rng(0), 1
    step = max(1, MAX_DRAWN // len(sizes))
    for start in range(0, NUM_FLIPS, step):
        flips = random.binomial(counts, 0.5, size=(min(step, NUM_FLIPS - start), len(sizes)))
        found += int((np.abs((2 * flips - counts) @ sizes) >= least).sum())
    return found / (NUM_FLIPS + 1)
