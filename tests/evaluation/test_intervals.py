"""The intervals cover the true mean about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from dora_ray.evaluation.intervals import mean_interval, share_interval


def test_wilson_of_a_known_case():
    # 10 of 40: the textbook's interval.
    assert share_interval(10, 40) == pytest.approx([0.1419, 0.4019], abs=2e-4)
    assert share_interval(0, 10)[0] == 0
    assert share_interval(10, 10) == pytest.approx([0.7225, 1], abs=2e-4)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_shares_are_covered(share):
    rng = np.random.default_rng(0)
    intervals = [share_interval(int(rng.binomial(60, share)), 60) for _ in range(600)]
    assert 0.92 <= np.mean([low <= share <= high for low, high in intervals]) <= 0.98


def test_means_are_covered():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.beta(2, 5, 50), seed=n) for n in range(300)]
    assert 0.90 <= np.mean([low <= 2 / 7 <= high for low, high in intervals]) <= 0.99


def test_the_seed_decides():
    values = np.random.default_rng(2).random(20)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)
