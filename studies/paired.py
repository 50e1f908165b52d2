"""Differences between two settings, seed by seed, and how sure they are.

Two runs of one seed see the same batches in the same order, so their difference varies less than
either of them: a pair tells more than two means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


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
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Difference(mean, None, None, 1)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values[picks].mean(axis=1), [tail, 100 - tail])
    return Difference(mean, float(low), float(high), len(values))
