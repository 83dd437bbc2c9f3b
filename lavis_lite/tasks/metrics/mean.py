"""A metric that is a mean over samples, with the samples' scores, for an interval of confidence around it."""

from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95


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
        values, counts = np.unique(self.scores, return_counts=True)
        number = int(counts.sum())
        drawn = np.random.default_rng(0).multinomial(number, counts / number, size=NUM_RESAMPLES)
        outside = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(drawn @ values / number, [outside, 100 - outside])
        return float(low), float(high)
