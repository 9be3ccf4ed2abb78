"""Ending a process that hangs, whatever it holds."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from dora_ray.data import watchdog
from dora_ray.data.watchdog import begin_attempt, end_attempt, time_limit

# PyDLL, unlike CDLL, keeps the interpreter's lock during the call, as decord does.
HANG = """
import ctypes
from dora_ray.data.watchdog import time_limit
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
    first = begin_attempt("a", limit_seconds=100.0)
    second = begin_attempt("a", limit_seconds=100.0)
    third = begin_attempt("a", limit_seconds=0.0)
    assert [(a.hung, a.died) for a in (first, second, third)] == [(0, 0), (0, 1), (1, 1)]
    assert begin_attempt("b", limit_seconds=0.0).hung == 0
    end_attempt("a")
    assert begin_attempt("a", limit_seconds=0.0).hung == 0
    end_attempt("a")
    end_attempt("b")


@pytest.mark.ray
def test_a_late_restart_is_no_hang(ray_cluster, monkeypatch):
    """A node was lost and another had to be waited for: it may have hung or not."""
    monkeypatch.setattr(watchdog, "RESTART_SECONDS", 0.0)
    begin_attempt("c", limit_seconds=0.0)
    again = begin_attempt("c", limit_seconds=0.0)
    assert (again.hung, again.died) == (0, 1)
    end_attempt("c")
