"""Interactions: found where they are, with an interval that holds what it promises where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from dora_ray.tuning.interactions import interaction, joint_effect
from dora_ray.tuning.statistics import Observation
from tests.tuning.observations import made_up


def test_interactions_are_means_of_cells():
    found = [Observation((k, t), seed, k + t + seed) for k in (1, 2) for t in (0, 5) for seed in (0, 1)]
    cells = interaction(found, lambda point: point[0], lambda point: point[1])
    assert cells == {(1, 0): 1.5, (1, 5): 6.5, (2, 0): 2.5, (2, 5): 7.5}


def _joint(found):
    return joint_effect(found, lambda point: point[0], lambda point: point[1], lambda point: point[2])


@pytest.mark.parametrize("shared", [0.0, 0.03])
def test_what_adds_up_interacts_by_chance_alone(shared):
    rng = np.random.default_rng(3)
    truth = {(t, k, i): 0.3 + 0.01 * k - 0.02 * t + 0.01 * i for t in (0, 1) for k in (1, 3, 6) for i in (0, 30)}
    joints = [_joint(made_up(rng, truth, seeds=4, noise=0.02, shared=shared)) for _ in range(400)]
    assert {joint.of for joint in joints} == {3}
    # Bonferroni's is a little wider than it has to be.
    assert 0.94 <= np.mean([joint.difference.low <= 0 for joint in joints]) <= 0.99


def test_factors_that_act_on_each_other_are_found_with_their_values():
    rng = np.random.default_rng(4)
    truth = {(t, k, i): 0.3 + (0.1 if (t, k) == (1, 6) else 0.0) for t in (0, 1) for k in (1, 6) for i in (0, 30)}
    joint = _joint(made_up(rng, truth, seeds=4, noise=0.02, shared=0.02))
    assert (joint.change, joint.more, joint.less, joint.of) == ((0, 1), 6, 1, 1)
    assert joint.difference.low <= 0.1 <= joint.difference.high
    assert joint.difference.low > 0


def test_what_is_not_crossed_or_not_repeated_shows_no_interaction():
    rng = np.random.default_rng(5)
    truth = {(t, k, 0): 0.3 for t in (0, 1) for k in (1, 6)}
    assert _joint(made_up(rng, truth, seeds=1, noise=0.02, shared=0)) is None
    assert _joint(made_up(rng, truth, seeds=2, noise=0.02, shared=0)) is not None
    for uneven in ({(1, 6, 30): 0.3}, {(2, 1, 0): 0.3}):
        assert _joint(made_up(rng, truth | uneven, seeds=2, noise=0.02, shared=0)) is None
