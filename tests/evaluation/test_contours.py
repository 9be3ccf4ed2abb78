from __future__ import annotations

import numpy as np
import pytest

from dora_ray.evaluation.contours import boundary, boundary_accuracy, dilate, region_similarity, statistics


def test_region_similarity_counts_pixels():
    first, second = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert region_similarity(first, second) == 1.0
    first[:2], second[1:3] = True, True
    assert region_similarity(first, second) == pytest.approx(4 / 12)


@pytest.mark.parametrize("radius", [0, 1, 2, 5])
def test_dilation_is_all_pixels_within_the_radius(radius):
    mask = np.random.default_rng(0).random((17, 23)) > 0.97
    rows, columns = np.indices(mask.shape)
    expected = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        expected |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    np.testing.assert_array_equal(dilate(mask, radius=radius), expected)


def test_a_boundary_is_where_a_mask_changes():
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    expected = np.zeros((6, 6), bool)
    expected[1:4, 1:4] = True
    expected[2, 2] = False
    np.testing.assert_array_equal(boundary(mask), expected)


def test_boundary_accuracy_forgives_small_shifts_only():
    truth = np.zeros((480, 854), bool)
    truth[100:300, 200:500] = True
    assert boundary_accuracy(truth, truth) == 1.0
    assert boundary_accuracy(np.roll(truth, 8, axis=1), truth) == 1.0
    assert 0.3 < boundary_accuracy(np.roll(truth, 12, axis=1), truth) < 0.7
    assert boundary_accuracy(np.zeros_like(truth), truth) == 0.0
    assert boundary_accuracy(np.zeros_like(truth), np.zeros_like(truth)) == 1.0


def test_statistics_by_hand():
    """Eight frames: the quarters are frames 1-3, 3-5, 5-6 and 6-8 (their borders are shared)."""
    values = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    found = statistics(values)
    assert found["mean"] == pytest.approx(0.65)
    assert found["recall"] == 5 / 8  # 0.5 itself is not above 0.5
    assert found["decay"] == pytest.approx((1.0 + 0.9 + 0.8) / 3 - (0.5 + 0.4 + 0.3) / 3)
    assert statistics([0.7]) == {"mean": 0.7, "recall": 1.0, "decay": 0.0}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 68, 102, 300])
def test_decay_is_that_of_davis(count):
    """As the benchmark's own code has it, but for its numbers of 8 bits, which end at 255 frames."""
    values = np.random.default_rng(count).random(count)
    ids = (np.round(np.linspace(1, count, 5) + 1e-10) - 1).astype(int)
    bins = [values[ids[i] : ids[i + 1] + 1] for i in range(4)]
    assert statistics(values)["decay"] == pytest.approx(bins[0].mean() - bins[3].mean())


def test_measures_are_those_of_vos_benchmark():
    """An independent implementation (MIT), of two objects that come, go and change, over 12 frames."""
    evaluator = pytest.importorskip("vos_benchmark.evaluator").Evaluator()
    rng = np.random.default_rng(0)
    truth, found = np.zeros((2, 12, 120, 90), np.uint8)
    for t in range(12):
        truth[t, 10 + 2 * t : 60 + 2 * t, 10:50] = 1
        truth[t, 30:70, 40 + t : 85] = 2 if t < 9 else 0
        found[t] = np.roll(truth[t], rng.integers(-6, 7, size=2), axis=(0, 1))
        found[t, rng.integers(0, 90) :, 60:] = 0
        evaluator.feed_frame(found[t], truth[t])
    j, f = evaluator.conclude()
    for k in (1, 2):
        pairs = [(found[t] == k, truth[t] == k) for t in range(12)]
        assert 100 * statistics([region_similarity(*pair) for pair in pairs])["mean"] == pytest.approx(j[k])
        assert 100 * statistics([boundary_accuracy(*pair) for pair in pairs])["mean"] == pytest.approx(f[k])
