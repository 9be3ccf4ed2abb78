"""The CPU seconds of a cluster's processes, some of which end."""

from __future__ import annotations

import pytest

from dora_ray.bench.cluster import cpu_between


def test_a_process_that_ended_takes_nothing_back():
    before = {(1, 0.0): 5.0, (2, 0.0): 3.0}
    after = {(1, 0.0): 6.5, (3, 9.0): 0.25}
    assert cpu_between(before, after) == pytest.approx(1.75)


def test_a_new_process_with_an_old_number_counts_from_its_own_start():
    assert cpu_between({(1, 0.0): 5.0}, {(1, 7.0): 0.5}) == 0.5
