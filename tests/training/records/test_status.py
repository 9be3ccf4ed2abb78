"""How a run is doing: from the files of runs that start, train, were killed, failed, and recovered."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dora_ray.errors import ConfigError
from dora_ray.training.records.status import summarize


def write(run: Path, *, status: dict | None = None, events: list | None = None, metrics: list | None = None) -> str:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}\n")
    if status is not None:
        (run / "status.json").write_text(json.dumps(status))
    for name, lines in (("events.jsonl", events), ("metrics.jsonl", metrics)):
        if lines is not None:
            (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(run)


def test_a_run_that_has_only_been_launched(tmp_path):
    facts = summarize(write(tmp_path / "run"))
    assert facts["state"] == "starting"
    assert "step" not in facts


def test_interruptions_are_counted_and_the_last_checkpoint_has_an_age(tmp_path):
    now = time.time()
    events = [
        {"time": now - 90, "event": "start", "attempt": 1, "step": 0, "world_size": 2},
        {"time": now - 60, "event": "checkpoint", "attempt": 1, "step": 20, "name": "step-00000020"},
        {"time": now - 50, "event": "failure", "rank": 1, "error": "killed"},
        {"time": now - 40, "event": "start", "attempt": 2, "step": 20, "world_size": 1},
        {"time": now - 40, "event": "resize", "attempt": 2, "step": 20, "before": 2, "after": 1},
        {"time": now - 39, "event": "recovered", "attempt": 2, "step": 21, "seconds": 11.5, "steps_lost": 4},
        {"time": now - 20, "event": "checkpoint", "attempt": 2, "step": 40, "name": "step-00000040"},
    ]
    status = {"time": now - 5, "state": "running", "step": 50, "steps": 100, "world_size": 1, "failures": 0}
    facts = summarize(write(tmp_path / "run", status=status, events=events))
    assert facts["state"] == "running"
    assert (facts["step"], facts["steps"], facts["world_size"]) == (50, 100, 1)
    assert facts["last_checkpoint"] == "step-00000040"
    assert facts["last_checkpoint_seconds"] == pytest.approx(20, abs=2)
    assert (facts["failures"], facts["resizes"], facts["restarts"]) == (1, 1, 1)
    assert (facts["recovery_seconds"], facts["steps_lost"]) == ([11.5], 4)


def test_videos_that_are_not_whole_are_told_once(tmp_path):
    lines = [{"time": n, "event": "missing_frames", "video": "/a.mp4", "missing": f"{n} of 9"} for n in (1, 2)]
    assert summarize(write(tmp_path / "run", events=lines))["missing_frames"] == ["/a.mp4: 2 of 9"]
    assert "missing_frames" not in summarize(write(tmp_path / "other", events=[]))


@pytest.mark.parametrize(("age", "state"), [(100, "running"), (400, "silent")])
def test_a_run_that_says_running_is_believed_for_a_while(tmp_path, age, state):
    status = {"time": time.time() - age, "state": "running", "step": 5, "steps": 9}
    assert summarize(write(tmp_path / "run", status=status))["state"] == state


def test_a_run_with_slow_steps_is_believed_for_longer(tmp_path):
    then = time.time() - 900
    metrics = [{"step": step, "time": then + 200 * step, "attempt": 1, "world_size": 1} for step in (1, 2)]
    run = write(tmp_path / "run", status={"time": then, "state": "running", "step": 2}, metrics=metrics)
    assert summarize(run)["state"] == "running"


def test_a_restart_that_takes_long_is_no_silence(tmp_path):
    now = time.time()
    events = [{"time": now - 10, "event": "failure", "rank": 0, "error": "killed"}]
    run = write(tmp_path / "run", status={"time": now - 900, "state": "running", "step": 2}, events=events)
    assert summarize(run)["state"] == "running"


def test_a_failed_run_tells_why_and_how_far_it_was(tmp_path):
    status = {"time": time.time(), "state": "failed", "error": "VideoError", "message": "too many clips"}
    metrics = [{"step": 7, "time": time.time(), "attempt": 1, "world_size": 2, "clips_per_second": 3.5}]
    facts = summarize(write(tmp_path / "run", status=status, metrics=metrics))
    assert (facts["state"], facts["step"], facts["world_size"]) == ("failed", 7, 2)
    assert (facts["error"], facts["message"]) == ("VideoError", "too many clips")


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match="it is not a run's folder"):
        summarize(str(tmp_path))
    with pytest.raises(ConfigError, match="it is not a run's folder"):
        summarize(str(tmp_path / "missing"))


@pytest.mark.parametrize("content", ['{"state": "run', "[1, 2]", "7"])
def test_a_damaged_status_is_named(tmp_path, content):
    run = write(tmp_path / "run", status={})
    (tmp_path / "run" / "status.json").write_text(content)
    with pytest.raises(ConfigError, match="is damaged"):
        summarize(run)
