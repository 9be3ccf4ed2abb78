"""How far a sweep is, as its process sees it and as `dora-ray status` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_ray.errors import ConfigError
from dora_ray.training.records.heartbeat import HEARTBEAT, Heartbeat
from dora_ray.training.records.journal import read_status
from dora_ray.tuning import progress as progress_module
from dora_ray.tuning.progress import SweepProgress, read_points, summarize_sweep
from dora_ray.tuning.results import write_spec
from dora_ray.tuning.space import load_sweep
from dora_ray.tuning.sweep import check_folder


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


def test_a_trial_without_a_step_waits_for_its_first_clips(tmp_path, clock):
    progress = _sweep(tmp_path)
    for name in ("t0", "t1", "t2"):
        progress.start(name)
    progress.step("t0", 10)
    progress.end("t1", "failed")
    assert progress.waiting == {"t2"}
    progress.write("running", ["t0", "t2"], force=True)
    assert read_status(str(tmp_path))["running"] == {
        "t0": "10 of 100 steps",
        "t2": "0 of 100 steps, reading its first clips",
    }


def test_a_folder_in_use_is_named_by_its_question_and_progress(tmp_path, clock):
    spec = load_sweep({"question": "Which k?", "base": "tiny", "space": {"tracking.num_objects": {"grid": [1, 2]}}})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty \(notes.txt\) and holds no sweep: choose another --out"):
        check_folder(str(tmp_path), spec, resume=False)
    write_spec(str(tmp_path / "sweep.yaml"), spec)
    (tmp_path / "trials").mkdir()
    with pytest.raises(ConfigError, match=r"already holds the sweep 'Which k\?'\. Continue with --resume"):
        check_folder(str(tmp_path), spec, resume=False)
    progress = _sweep(tmp_path)
    progress.end("t0", "done")
    progress.write("running", [], force=True)
    with pytest.raises(ConfigError, match=r"'Which k\?' \(1 of 4 trials done\)\. Continue with --resume, or choose"):
        check_folder(str(tmp_path), spec, resume=False)


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
