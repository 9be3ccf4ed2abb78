"""Runs of Ray Tune that end before their trials do."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError
from ray.tune import TuneError

from dora_ray.tuning.tuner import run_through_lost_memory


class Runs:
    """A run that raises what it is given, one after the other."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.count = list(errors), 0

    def __call__(self) -> None:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)


def lost_memory() -> Exception:
    """As Ray Tune raises it: twice wrapped."""
    inner = RuntimeError("Caught unexpected exception")
    inner.__cause__ = OutOfMemoryError("memory on the node was 23 of 24 GB")
    outer = TuneError("The Ray Tune run failed")
    outer.__cause__ = inner
    return outer


def test_a_sweep_goes_on_after_memory_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    run = Runs(lost_memory(), lost_memory())
    run_through_lost_memory(run, 2)
    assert run.count == 3
    assert caplog.text.count("max_concurrent_trials") == 2


def test_but_not_for_ever_and_not_after_another_error() -> None:
    run = Runs(*(lost_memory() for _ in range(9)))
    with pytest.raises(TuneError):
        run_through_lost_memory(run, 2)
    assert run.count == 3
    run = Runs(RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        run_through_lost_memory(run, 2)
    assert run.count == 1
