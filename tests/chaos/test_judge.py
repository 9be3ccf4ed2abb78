"""Cost of faults from handwritten journal lines; every check can fail."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import dora_ray
from dora_ray.chaos.judge import Hit, Row, attempts, judge, weights_difference
from dora_ray.chaos.trial import compare, limits
from dora_ray.training.records.journal import read_history, read_lines


def journal(*tries: tuple[int, int, range, float]) -> tuple[list, list]:
    """Return lines of metrics.jsonl and events.jsonl for attempts (world size, begin, steps done, time of the start).

    The first step ends 10 s after the start, of which it took 6; the others take a second each.
    """
    metrics, events = [], []
    for attempt, (world_size, begin, done, start) in enumerate(tries, 1):
        events.append(
            {"time": start, "event": "start", "attempt": attempt, "step": begin, "world_size": world_size, "pid": 1}
        )
        metrics.append({"attempt": attempt, "begin": begin + 1})
        metrics += (
            {
                "step": step,
                "time": start + 10 + index,
                "attempt": attempt,
                "world_size": world_size,
                "step_seconds": 1.0 if index else 6.0,
            }
            for index, step in enumerate(done)
        )
    return metrics, events


SLOTS = {step: [step * 10, step * 10 + 1] for step in range(40)}


def test_a_kill_takes_back_the_steps_since_the_checkpoint():
    # Steps 1 to 20 end at 100 + 10 + 19 = 129; the checkpoint is of step 15, done at 124.
    tries = attempts(*journal((2, 0, range(1, 21), 100.0), (2, 15, range(16, 41), 145.0)))
    (row,) = judge([Hit("worker_kill", 20, 129.5)], tries, history=SLOTS, reference=SLOTS, clips_per_slot=2)
    assert row.world_sizes == (2, 2)
    assert row.steps_lost == 5
    assert row.work_lost_seconds == 5.0
    assert row.recovered_seconds == 145.0 + 10 - 129.5
    assert (row.clips_lost, row.clips_repeated) == (0, 0)


def test_a_drain_is_silent_from_the_last_step_on():
    tries = attempts(*journal((2, 0, range(1, 21), 100.0), (1, 20, range(21, 41), 150.0)))
    (row,) = judge([Hit("drain", 10, 120.0)], tries, history=SLOTS, reference=SLOTS, clips_per_slot=2)
    assert (row.steps_lost, row.work_lost_seconds) == (0, 0.0)
    assert row.recovered_seconds == 160.0 - 129.0
    assert limits(row) == []


def test_each_fault_answers_for_its_own_attempts():
    metrics, events = journal(
        (2, 0, range(1, 11), 100.0),
        (2, 8, range(0), 130.0),  # the first start after the fault failed
        (2, 8, range(9, 21), 150.0),
        (1, 20, range(21, 31), 200.0),
    )
    hits = [Hit("node_kill", 10, 120.0), Hit("drain", 20, 172.0)]
    first, second = judge(hits, attempts(metrics, events), history=SLOTS, reference=SLOTS, clips_per_slot=2)
    assert (first.world_sizes, first.steps_lost, first.work_lost_seconds) == ((2, 2, 2), 2, 2.0)
    assert first.recovered_seconds == 160.0 - 120.0
    assert (second.world_sizes, second.steps_lost) == ((2, 1), 0)


def test_a_kill_before_the_first_checkpoint_takes_back_all():
    tries = attempts(*journal((2, 0, range(1, 6), 100.0), (2, 0, range(1, 41), 130.0)))
    (row,) = judge([Hit("worker_kill", 5, 115.0)], tries, history=SLOTS, reference=SLOTS, clips_per_slot=2)
    assert row.steps_lost == 5
    assert row.work_lost_seconds == 10.0


def test_the_parts_of_a_recovery_are_told():
    metrics, events = journal((2, 0, range(1, 21), 100.0), (2, 15, range(16, 41), 145.0))
    told = {"time": 155.5, "event": "recovered", "attempt": 2, "step": 16, "seconds": 23.0, "steps_lost": 5}
    tries = attempts(metrics, [*events, {**told, "parts": {"reservation": 3.0, "worker_start": 20.0}}])
    (row,) = judge([Hit("worker_kill", 20, 129.5)], tries, history=SLOTS, reference=SLOTS, clips_per_slot=2)
    assert row.parts == {"detection": 3.0, "reservation": 3.0, "worker_start": 20.0}


def test_a_fault_without_a_later_step():
    tries = attempts(*journal((2, 0, range(1, 6), 100.0)))
    (row,) = judge([Hit("join", 5, 115.0)], tries, history=SLOTS, reference=SLOTS, clips_per_slot=2)
    assert row.recovered_seconds is None
    assert limits(row) == ["join at step 5: no step followed"]
    assert judge([], tries, history=SLOTS, reference=SLOTS, clips_per_slot=2) == []


def test_clips_are_counted_by_the_fault_that_lost_them():
    tries = attempts(
        *journal((2, 0, range(1, 11), 100.0), (2, 10, range(11, 21), 130.0), (2, 20, range(21, 41), 160.0))
    )
    hits = [Hit("worker_kill", 10, 120.0), Hit("worker_kill", 20, 150.0)]
    # Step 12 has one slot twice instead of its other one; step 25 is missing.
    ours = {step: slots for step, slots in SLOTS.items() if step != 25} | {12: [120, 120]}
    rows = judge(hits, tries, history=ours, reference=SLOTS, clips_per_slot=2)
    assert [(row.clips_lost, row.clips_repeated) for row in rows] == [(2, 2), (4, 0)]
    assert limits(rows[0]) == ["worker_kill at step 10: 2 clips lost, 2 repeated"]


@pytest.mark.parametrize(
    ("fault", "steps", "seconds", "holds"),
    [
        ("worker_kill", 20, 5.0, True),
        ("worker_kill", 20, 7.0, False),
        ("checkpoint_kill", 20, 7.0, False),
        ("node_kill", 20, 7.0, False),
        ("drain", 0, 0.0, True),
        ("drain", 1, 0.2, False),
        ("join", 0, 0.0, True),
        ("join", 1, 0.2, False),
        ("stall", 20, 7.0, False),
    ],
)
def test_limits_of_a_faults_cost(fault, steps, seconds, holds):
    row = Row(fault, 30, (2, 3), 12.0, steps, seconds, 0, 0, {})
    assert (limits(row) == []) == holds


@pytest.mark.parametrize(("sizes", "holds"), [((1, 2), True), ((2, 1, 3), True), ((2, 2), False), ((2, 3, 2), False)])
def test_after_a_join_the_world_is_larger(sizes, holds):
    problems = [] if holds else [f"join at step 30: a node joined, but the workers were {' > '.join(map(str, sizes))}"]
    assert limits(Row("join", 30, sizes, 12.0, 0, 0.0, 0, 0, {})) == problems


@pytest.fixture(scope="module")
def trained(tmp_path_factory, store) -> Path:
    """Run six steps in this process."""
    from tests.conftest import BIKES, SMALL

    run = tmp_path_factory.mktemp("runs") / "run"
    dora_ray.train(dora_ray.load_config("tiny", *SMALL, f"data.videos=[{BIKES}]", f"data.store={store}"), out=run)
    return run


def test_a_run_is_compared_with_another(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    trial = compare("none", tmp_path / "run", trained, ())
    assert trial.problems == []
    assert trial.max_difference == 0.0


def test_a_history_that_was_tampered_with_is_found(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    lines = read_lines(str(run / "ledger.jsonl"))
    lines[-1]["slots"][0] += 1
    (run / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(str(run)) != read_history(str(trained))
    trial = compare("none", run, trained, ())
    assert trial.problems == ["the committed history differs from that of the undisturbed run"]


@pytest.mark.parametrize(("name", "change"), [("center", 1e-7), ("optimizer", 1e-3), ("step", 1.0)])
def test_one_changed_number_is_found(trained, tmp_path, name, change):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (checkpoint,) = (run / "checkpoints").glob("step-00000006")
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    if name == "center":
        state["center"][0] += change
    elif name == "step":
        state["step"] += int(change)
    else:
        next(iter(state["optimizer"]["state"].values()))["exp_avg"].view(-1)[0] += change
    torch.save(state, checkpoint / "state.pt")
    trial = compare("none", run, trained, ())
    assert len(trial.problems) == 1
    assert "differ from the undisturbed run's" in trial.problems[0]
    assert trial.max_difference == pytest.approx(change, rel=0.2)


def test_weights_that_are_not_numbers_or_not_there_differ_infinitely(trained, tmp_path):
    (checkpoint,) = (trained / "checkpoints").glob("step-00000006")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    state["center"][0] = math.nan
    torch.save(state, other / "state.pt")
    assert weights_difference(str(other), str(checkpoint)) == math.inf
    del state["center"]
    torch.save(state, other / "state.pt")
    assert weights_difference(str(other), str(checkpoint)) == math.inf
