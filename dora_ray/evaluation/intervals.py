"""95 % confidence intervals of means over independent images, clips or objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def share_interval(right: float, total: int) -> list[float]:
    """Return Wilson's score interval [low, high] of the share right / total; it always stays within [0, 1]."""
    share, z2 = right / total, _Z**2 / total
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * (share * (1 - share) / total + z2 / (4 * total)) ** 0.5 / (1 + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def mean_interval(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> list[float]:
    """Return the bootstrap interval [low, high] of a mean: percentiles 2.5 and 97.5 of 2000 resamples."""
    numbers = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[picks].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]
