"""Schedules of faults: a function of the seed, with distance between faults; and the resulting runs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_ray.chaos.run import Planned, check, plan_trials
from dora_ray.chaos.schedule import ALONE, FAULTS, LIVE, OF_WORKERS, QUICK, draw_schedule
from dora_ray.errors import ConfigError


@given(
    faults=st.lists(st.sampled_from(LIVE), min_size=1, max_size=20),
    seed=st.integers(0, 2**64),
    first=st.integers(0, 50),
    part=st.integers(2, 60),
)
def test_strikes_keep_their_order_and_their_distance(faults, seed, first, part):
    last = first + part * len(faults)
    schedule = draw_schedule(faults, seed=seed, first=first, last=last)
    assert [what.fault for what in schedule] == faults
    assert schedule == draw_schedule(faults, seed=seed, first=first, last=last)
    steps = [what.step for what in schedule]
    assert first <= steps[0]
    assert steps[-1] < last
    assert all(later - earlier >= part / 2 - 1 for earlier, later in itertools.pairwise(steps))
    assert all(0 <= what.draw < 1 for what in schedule)


def test_another_seed_gives_other_strikes():
    schedules = {tuple(draw_schedule(LIVE, seed=seed, first=0, last=500)) for seed in range(20)}
    assert len(schedules) == 20


def test_each_fault_has_a_run_of_its_own_unless_it_is_to_be_quick():
    assert plan_trials(["drain", "truncate", "join"], count=2, quick=False) == [
        Planned("drain", ("drain", "drain")),
        Planned("join", ("join", "join")),
        Planned("truncate"),
    ]
    assert plan_trials(QUICK, count=1, quick=True) == [Planned("worker_kill+drain+join", QUICK)]
    assert plan_trials(["truncate"], count=1, quick=True) == [Planned("truncate")]


def test_a_comparison_repeats_what_strikes_a_living_run():
    assert plan_trials(["worker_kill", "stall"], count=3, quick=False, compare=True) == [
        Planned("worker_kill", ("worker_kill",) * 3),
        Planned("stall", ("stall",) * 3),
        Planned("worker_kill-at-rays-pace", ("worker_kill",) * 3, plain=True),
        Planned("stall-at-rays-pace", ("stall",) * 3, plain=True),
    ]


def test_default_faults():
    assert check((), count=1) == list(FAULTS)
    assert check((), count=1, quick=True) == list(QUICK)
    assert check((), count=1, compare=True) == list(OF_WORKERS)
    assert check((), count=1, quick=True, compare=True) == ["worker_kill"]


@pytest.mark.parametrize("fault", sorted({*FAULTS} - {*OF_WORKERS}))
def test_a_comparison_that_the_clusters_own_settings_would_decide_is_refused(fault):
    assert check(OF_WORKERS, count=1, compare=True) == list(OF_WORKERS)
    with pytest.raises(
        ConfigError, match=f"--compare --faults {fault}: .* choose from worker_kill, checkpoint_kill, stall"
    ):
        check(["worker_kill", fault], count=1, compare=True)


def test_an_unknown_fault_is_told_with_those_that_are_known():
    assert check(FAULTS, count=1) == list(FAULTS)
    assert set(LIVE).isdisjoint(ALONE)
    with pytest.raises(ConfigError, match=r"--faults earthquake: unknown; choose from worker_kill, .*hung_decoder"):
        check(["drain", "earthquake"], count=1)
    with pytest.raises(ConfigError, match="--count 0: each fault must strike at least once"):
        check(["drain"], count=0)
