"""95 % intervals of a mean over images, clips or objects that were drawn independently of each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def share_interval(right: float, total: int) -> list[float]:
    """Give Wilson's interval of the share right / total: [low, high], inside [0, 1] even at the ends."""
    share, z2 = right / total, _Z**2 / total
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * (share * (1 - share) / total + z2 / (4 * total)) ** 0.5 / (1 + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def mean_interval(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> list[float]:
    """Give the bootstrap's interval of a mean, [low, high]: 2000 resamples of the values, percentiles 2.5 and 97.5."""
    numbers = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[picks].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]
