"""How far a sweep is, as its process sees it and as `dora-ray status` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_ray.training.records.heartbeat import HEARTBEAT, Heartbeat
from dora_ray.tuning import progress as progress_module
from dora_ray.tuning.progress import SweepProgress, read_points, summarize_sweep


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def _sweep(folder: Path, trials: int = 4) -> SweepProgress:
    return SweepProgress(str(folder), trials, 100 * trials, {f"t{number}": 100 for number in range(trials)})


def test_trials_and_the_steps_within_them_are_counted(tmp_path, clock):
    progress = _sweep(tmp_path)
    assert progress.eta_seconds is None
    progress.step("t0", 0)
    clock[0] = 10.0
    progress.step("t0", 50)
    assert progress.steps_done == 50
    assert progress.eta_seconds == pytest.approx(70)
    progress.end("t0", "failed")
    assert progress.steps_done == 100, "a trial that has ended needs no more steps"
    assert progress.facts() | {"eta_seconds": 0} == {
        "trials": 4, "done": 0, "stopped": 0, "failed": 1, "steps_done": 100, "steps": 400, "eta_seconds": 0,
    }  # fmt: skip


def test_what_was_done_before_says_nothing_of_the_speed_now(tmp_path, clock):
    run = tmp_path / "trials" / "t1"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (10, 20)))
    progress = _sweep(tmp_path)
    progress.find(["t0", "t1"], {"t0": "done"})
    assert progress.steps_done == 120
    for step in (10, 20):
        progress.step("t1", step)
    progress.step("t0", 100)
    progress.end("t0", "done")
    clock[0] = 10.0
    assert progress.eta_seconds is None, "reports of old lines are no progress"
    progress.step("t1", 60)
    assert progress.eta_seconds == pytest.approx(240 * 10 / 40)


def test_status_tells_how_far_a_sweep_is(tmp_path):
    progress = _sweep(tmp_path)
    with Heartbeat(str(tmp_path)):
        progress.step("t0", 30)
        progress.write("running", ["t0"], force=True)
        facts = summarize_sweep(str(tmp_path))
    assert facts["state"] == "running"
    assert (facts["steps_done"], facts["steps"], facts["trials"]) == (30, 400, 4)
    assert facts["running"] == {"t0": "30 of 100 steps"}
    beat = json.loads((tmp_path / HEARTBEAT).read_text())
    (tmp_path / HEARTBEAT).write_text(json.dumps(beat | {"pid": 2**22 - 3}))
    dead = summarize_sweep(str(tmp_path))
    assert dead["state"] == "dead"
    assert "running" not in dead
    progress.write("done", [], force=True)
    assert summarize_sweep(str(tmp_path))["state"] == "done"


def test_a_folder_without_a_status_is_unknown_and_damage_does_not_end_it(tmp_path):
    assert summarize_sweep(str(tmp_path))["state"] == "unknown"
    (tmp_path / "status.json").write_text('{"state": "run')
    assert summarize_sweep(str(tmp_path))["state"] == "unknown"


def test_points_read_back_but_for_a_line_that_was_cut_short(tmp_path):
    assert read_points(str(tmp_path)) == []
    (tmp_path / "trials.jsonl").write_text(
        '{"name": "a", "values": {"optim.lr": 0.1, "run.seed": 0}}\n{"name": "b", "va'
    )
    assert read_points(str(tmp_path)) == [{"optim.lr": 0.1, "run.seed": 0}]
