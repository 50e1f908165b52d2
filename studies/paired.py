"""Differences between two settings, seed by seed, and how sure they are.

Two runs of one seed see the same batches in the same order, so their difference varies less than
either of them: a pair tells more than two means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
LEVEL = 0.95
_TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its bootstrap interval.

    Attributes:
        mean: The mean.
        low: Lower end of the interval; ``None`` for a single pair, which says nothing of spread.
        high: Upper end.
        num: Number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    num: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def paired_difference(differences: Sequence[float], *, seed: int = 0) -> Difference:
    """Returns the mean of differences and the percentile interval of its bootstrap.

    With few pairs the interval is too narrow (two pairs have three different resamples), so
    whoever shows it says how many there are.

    Args:
        differences: One a seed.
        seed: Of the resampling, so that the same runs give the same interval.

    Raises:
        ValueError: If there are none.
    """
    if not differences:
        raise ValueError("a paired difference needs at least one pair, but got none")
    if len(differences) == 1:
        return Difference(float(differences[0]), None, None, 1)
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean())
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), _TAILS)
    return Difference(mean, float(low), float(high), len(values))


def sampled_difference(ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0) -> Difference:
    """Returns the mean difference in points of 100, and an interval over seeds and test samples.

    Each resample draws seeds and, apart from them, test samples, both with replacement: the
    interval answers to other seeds and to another test set of this size. Only with one seed is it
    over samples alone.

    Args:
        ours: The metric of every test sample in [0, 1], ``(S, N)`` by seed and sample.
        theirs: The same of what it is compared with: same seeds, same samples.
        seed: Of the resampling.

    Raises:
        ValueError: If the two differ in shape or are empty.
    """
    first, second = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(
            "outcomes must be (seeds, samples) on both sides, of the same seeds and samples, but "
            f"got {first.shape} and {second.shape}"
        )
    gains = 100 * (first - second)
    num_seeds, num_samples = gains.shape
    random = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):  # one at a time: all at once would take RESAMPLES * N numbers
        by_sample = gains[random.integers(num_seeds, size=num_seeds)].mean(axis=0)
        means[i] = by_sample[random.integers(num_samples, size=num_samples)].mean()
    low, high = np.percentile(means, _TAILS)
    return Difference(float(gains.mean()), float(low), float(high), num_seeds)
