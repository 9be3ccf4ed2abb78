from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_ray.method.schedules import cosine
from tests.oracles.method import cosine_schedule

VALUES = st.floats(-10, 10, allow_nan=False)


@given(start=VALUES, end=VALUES, warmup_start=VALUES, num_steps=st.integers(1, 50), data=st.data())
def test_equals_the_whole_schedule_written_out(start, end, warmup_start, num_steps, data):
    warmup_steps = data.draw(st.integers(0, num_steps))
    arguments = {"start": start, "end": end, "num_steps": num_steps}
    ours = [
        cosine(step, warmup_steps=warmup_steps, warmup_start=warmup_start, **arguments) for step in range(num_steps)
    ]
    expected = cosine_schedule(start, end, num_steps, warmup_steps, warmup_start)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)


def test_end_points():
    arguments = {"start": 1.0, "end": 0.1, "num_steps": 110, "warmup_steps": 10, "warmup_start": 0.5}
    assert cosine(0, **arguments) == 0.5
    assert cosine(9, **arguments) == 1.0
    assert cosine(10, **arguments) == 1.0
    assert cosine(60, **arguments) == pytest.approx(0.55)
    assert cosine(110, **arguments) == 0.1
    assert cosine(1000, **arguments) == 0.1


def test_warmup_starts_at_zero_and_may_be_left_out():
    assert cosine(0, start=1.0, end=0.0, num_steps=10, warmup_steps=3) == 0.0
    assert cosine(0, start=1.0, end=0.0, num_steps=10) == 1.0


def test_a_warmup_of_one_step_and_of_the_whole_run():
    assert cosine(0, start=1.0, end=0.0, num_steps=4, warmup_steps=1, warmup_start=0.2) == 0.2
    assert [cosine(step, start=1.0, end=0.0, num_steps=3, warmup_steps=3) for step in range(4)] == [0.0, 0.5, 1.0, 0.0]
