"""Waits travel in a sum over ranks; the one who waited longest is told of."""

from __future__ import annotations

import pytest

from dora_ray.training.records.waits import Waits


def test_the_rank_that_waited_longest_speaks_with_all_its_stages() -> None:
    seconds = [{"production_wait": 3.0 * rank, "format": 0.5} for rank in range(3)]
    ranks = [Waits(rank, 3, lambda rank=rank: dict(seconds[rank])) for rank in range(3)]
    for waits, waited in zip(ranks, (0.5, 1.5, 1.0), strict=True):
        waits.add(waited)
        waits.add(waited)
    total = sum(waits.take() for waits in ranks)
    expected = {"exposed_wait_seconds": 1.5, "blocked_production_wait_seconds": 1.5, "blocked_format_seconds": 0.25}
    for waits in ranks:
        assert waits.values(total) == pytest.approx(expected)


def test_each_line_counts_since_the_one_before() -> None:
    seconds = {"format": 1.0}
    waits = Waits(0, 1, lambda: dict(seconds))
    waits.add(2.0)
    waits.take()
    seconds["format"] = 1.25
    waits.add(0.5)
    assert waits.values(waits.take()) == pytest.approx({"exposed_wait_seconds": 0.5, "blocked_format_seconds": 0.25})


def test_without_ray_there_are_no_stages() -> None:
    waits = Waits(0, 1, dict)
    waits.add(0.25)
    assert waits.values(waits.take()) == {"exposed_wait_seconds": 0.25}
