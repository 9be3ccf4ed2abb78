"""Reads that hang or kill their process: the record of earlier attempts, and the items given up."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from dora_ray import ray_internals
from dora_ray.store import hangs
from dora_ray.store.hangs import EVERYTHING, NAMESPACE, Ended, TaskWatch, given_up

HUNG, DIED = True, False


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ([(3, HUNG)], {3}),
        ([(3, DIED), (3, HUNG)], set()),
        ([(3, DIED)] * 3, set()),
        ([(3, DIED)] * 4, {3}),
        ([(3, HUNG), (5, HUNG)], {3}),
        ([(3, HUNG), (5, HUNG), (5, HUNG)], EVERYTHING),
        ([(item, DIED) for item in range(9)], EVERYTHING),
    ],
)
def test_an_item_is_given_up_when_it_has_hung_twice(ended, expected) -> None:
    """The first attempt recorded nothing, and is assumed to have ended like the second."""
    assert given_up([Ended(*fields) for fields in ended]) == expected


# PyDLL, unlike CDLL, holds the GIL during the call, as decord does.
HANG = """
import ctypes, sys
from dora_ray import ray_internals
import ray
from dora_ray.store.hangs import TaskWatch

class Context:
    def get_task_id(self):
        return "x"

ray.get_runtime_context, ray_internals.attempt_number = Context, lambda: 0
with TaskWatch(2.0) as watch:
    watch.begin(0)
    ctypes.PyDLL(None).sleep(60)
"""


def test_a_hang_that_holds_the_lock_ends_with_its_process() -> None:
    ended = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 1
    assert "Timeout (0:00:02)!" in ended.stderr


@pytest.fixture
def again(ray_cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start another attempt at a task of this process."""

    class Context:
        def get_task_id(self) -> str:
            return "one task"

    import ray

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    attempt = iter(range(99))
    monkeypatch.setattr(ray_internals, "attempt_number", lambda: next(attempt))
    yield TaskWatch
    ray_internals.delete_value("task one task", namespace=NAMESPACE)


def note(watch: TaskWatch, item: int) -> None:
    """Record of a task before it is killed."""
    watch._put(watch._ended, (item, time.time()))


@pytest.mark.ray
def test_attempts_are_told_apart_by_how_long_they_lasted(again) -> None:
    again(100.0)
    note(again(100.0), 7)
    watch = again(0.0)
    assert watch._ended == [(7, True)]
    assert watch.hung
    assert 7 in watch.given_up
    note(watch, 3)
    assert again(100.0)._ended == [(7, True), (3, False)]


@pytest.mark.ray
def test_an_attempt_without_an_item_adds_no_end(again) -> None:
    again(100.0)
    note(again(100.0), 7)
    again(100.0)
    assert again(0.0)._ended == [(7, False)]


@pytest.mark.ray
def test_a_late_restart_is_no_hang(again, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost node, and the wait for another, hide whether the task hung."""
    monkeypatch.setattr(hangs, "RESTART_SECONDS", 0.0)
    again(0.0)
    note(again(0.0), 0)
    watch = again(0.0)
    assert (watch._ended, watch.hung) == ([(0, False)], False)


@pytest.mark.ray
def test_finished_tasks_leave_no_record(again) -> None:
    again(100.0)
    with again(100.0) as watch:
        watch.begin(4)
        assert ray_internals.get_value("task one task", namespace=NAMESPACE) is not None
    assert ray_internals.get_value("task one task", namespace=NAMESPACE) is None
