"""A sign of life: of this process, of one that was killed, of one on another machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from dora_ray.training.records.heartbeat import HEARTBEAT, MISSED_BEATS, Heartbeat, is_dead
from dora_ray.training.records.status import summarize

BEATS = """
import sys, time
from dora_ray.training.records.heartbeat import Heartbeat
with Heartbeat(sys.argv[1]):
    print("beats", flush=True)
    time.sleep(600)
"""


def test_this_process_lives(tmp_path):
    assert is_dead(str(tmp_path)) is None
    with Heartbeat(str(tmp_path)):
        assert is_dead(str(tmp_path)) is False


def test_a_killed_process_is_dead_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BEATS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "beats\n"
    (tmp_path / "config.yaml").write_text("{}\n")
    (tmp_path / "status.json").write_text(json.dumps({"time": time.time(), "state": "running", "step": 3}))
    assert is_dead(str(tmp_path)) is False
    assert summarize(str(tmp_path))["state"] == "running"
    process.kill()
    process.stdout.close()
    process.wait()
    assert is_dead(str(tmp_path)) is True
    assert summarize(str(tmp_path))["state"] == "dead"


def test_another_process_with_the_same_number_is_not_taken_for_it(tmp_path):
    with Heartbeat(str(tmp_path)):
        pass
    beat = json.loads((tmp_path / HEARTBEAT).read_text())
    (tmp_path / HEARTBEAT).write_text(json.dumps(beat | {"started": beat["started"] - 1}))
    assert is_dead(str(tmp_path)) is True


@pytest.mark.parametrize(("beats", "dead"), [(1, False), (2 * MISSED_BEATS, True)])
def test_on_another_machine_its_beats_are_counted(tmp_path, beats, dead):
    beat = {"time": time.time() - 10 * beats, "every": 10, "host": "elsewhere", "pid": 1, "started": 1}
    (tmp_path / HEARTBEAT).write_text(json.dumps(beat))
    assert is_dead(str(tmp_path)) is dead


def test_a_damaged_sign_says_nothing(tmp_path):
    (tmp_path / HEARTBEAT).write_text('{"time": 1')
    assert is_dead(str(tmp_path)) is None
