"""A metric that is a mean over samples, with the samples' scores, for an interval of confidence around it."""

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MAX_DRAWN = 2 * 10**7
"""Random numbers in memory at once."""


class Mean(float):
    """A number as any other; pickled and copied as a plain float, so only the process that scored has the scores."""

    scores: np.ndarray
    """One per sample, in the unit of the mean."""

    def __new__(cls, value: float, scores: Sequence[float] | np.ndarray) -> "Mean":
        """Return `value`, the mean as the metric's definition computes and rounds it, with its samples' `scores`."""
        mean = super().__new__(cls, value)
        mean.scores = np.asarray(scores, dtype=np.float64)
        return mean

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the mean by the bootstrap: percentiles of resampled means (Efron 1979).

        Samples count as independent, which questions about one image are only roughly. The random numbers are fixed.
        """
        return bootstrap_interval(self.scores, np.ones_like(self.scores))

    def standard_error(self) -> float | None:
        """Return the standard deviation of the scores divided by the root of their number; None of a single score.

        Samples count as independent, as in `interval`.
        """
        number = len(self.scores)
        return float(self.scores.std(ddof=1) / np.sqrt(number)) if number > 1 else None


def bootstrap_interval(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of `sums.sum() / sizes.sum()` by drawing groups with replacement.

    `sums` (G) are the sums of the groups' scores, `sizes` (G) the numbers of their samples.
    """
    groups, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    number = int(counts.sum())
    random, means = np.random.default_rng(0), list[np.ndarray]()
    step = max(1, MAX_DRAWN // len(counts))
    for start in range(0, NUM_RESAMPLES, step):
        drawn = random.multinomial(number, counts / number, size=min(step, NUM_RESAMPLES - start))
        means.append((drawn @ groups[0]) / (drawn @ groups[1]))
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [outside, 100 - outside])
    return float(low), float(high)
