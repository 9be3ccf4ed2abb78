"""Ending a process that hangs, whatever it holds."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from dora_ray.store import watchdog
from dora_ray.store.watchdog import Attempts, time_limit

# PyDLL, unlike CDLL, keeps the interpreter's lock during the call, as decord does.
HANG = """
import ctypes
from dora_ray.store.watchdog import time_limit
with time_limit(1.0):
    ctypes.PyDLL(None).sleep(30)
"""


def test_a_hang_that_holds_the_lock_ends_with_its_process():
    ended = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "Timeout (0:00:01)!" in ended.stderr


def test_what_ends_in_time_is_left_alone():
    with time_limit(0.2):
        pass
    time.sleep(0.4)


@pytest.mark.ray
def test_attempts_are_told_apart_by_how_long_they_lasted(ray_cluster):
    for limit in (100.0, 100.0, 0.0):
        Attempts("a", limit_seconds=limit).note(7)
    attempt = Attempts("a", limit_seconds=100.0)
    assert attempt.ended == [(7, False), (7, True), (7, False)]
    assert Attempts("b", limit_seconds=0.0).ended == []
    attempt.forget()
    assert Attempts("a", limit_seconds=0.0).ended == []


@pytest.mark.ray
def test_an_attempt_that_ends_before_its_first_item_is_no_end_of_the_last_ones(ray_cluster):
    """The item of the attempt before it would look as if it had taken that much longer."""
    Attempts("d", limit_seconds=100.0).note(7)
    Attempts("d", limit_seconds=100.0)
    attempt = Attempts("d", limit_seconds=0.0)
    assert attempt.ended == [(7, False)]
    attempt.forget()


@pytest.mark.ray
def test_a_late_restart_is_no_hang(ray_cluster, monkeypatch):
    """A node was lost and another had to be waited for: it may have hung or not."""
    monkeypatch.setattr(watchdog, "RESTART_SECONDS", 0.0)
    Attempts("c", limit_seconds=0.0).note()
    attempt = Attempts("c", limit_seconds=0.0)
    assert attempt.ended == [(0, False)]
    attempt.forget()
