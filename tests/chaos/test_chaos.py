"""Command `chaos`: its output, its exit status, and three real faults on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace

import pytest

from dora_ray.chaos import run as chaos_run
from dora_ray.chaos.judge import Row
from dora_ray.chaos.trial import Trial
from dora_ray.commands import chaos
from dora_ray.errors import DoRAError

ROW = Row("worker_kill", 24, (2, 2), 22.46, 18, 3.31, 0, 0, {"detection": 1.02, "worker_start": 15.9})
GOOD = Trial("worker_kill", rows=[ROW], max_difference=0.0, notes=["a note"])


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command with a finished experiment; return its output."""

    def run(*trials: Trial) -> str:
        holds = not any(trial.problems for trial in trials)
        result = {"seed": 0, "holds": holds, "folder": "/runs", "trials": [asdict(trial) for trial in trials]}
        monkeypatch.setattr(chaos_run, "chaos", lambda *_, **__: result)
        options = Namespace(faults=None, seed=0, count=1, quick=True, compare=False, json=str(tmp_path / "result.json"))
        try:
            chaos.run(options)
        finally:
            assert json.loads((tmp_path / "result.json").read_text())["holds"] == holds
        return capsys.readouterr().out

    return run


def test_the_table_tells_what_a_fault_cost(call):
    out = call(GOOD)
    (line,) = (line for line in out.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "worker_kill", "24", "2 > 2", "22.5", "18", "3.3", "0", "0", "yes (0)"
    ]  # fmt: skip
    assert "detection 1.0, worker start 15.9" in out
    assert "a note" in out
    assert out.endswith("All checks passed.\n")


def test_violated_requirements_are_printed_and_give_status_1(call, capsys):
    bad = replace(GOOD, max_difference=0.25, problems=["weights differ"], rows=[replace(ROW, recovered_seconds=None)])
    with pytest.raises(DoRAError, match="1 checks failed; the runs' files are in /runs") as caught:
        call(GOOD, bad)
    assert caught.value.exit_status == 1
    out = capsys.readouterr().out
    assert "NO (0.25)" in out
    assert "never" in out
    assert "worker_kill: weights differ" in out


def test_a_run_without_faults_of_its_own_has_a_row(call):
    assert "truncate" in call(Trial("truncate", max_difference=0.0, notes=["it was refused"]))
    assert "corrupt_segment: refused" in call(Trial("corrupt_segment", notes=["refused"]))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
def test_a_kill_a_drain_and_a_join_cost_nothing_but_time(tmp_path):
    path = tmp_path / "result.json"
    words = ["chaos", "--quick", "--seed", "1", "--json", str(path)]
    done = subprocess.run([sys.executable, "-m", "dora_ray", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (trial,) = json.loads(path.read_text())["trials"]
    assert trial["max_difference"] == 0.0
    kill, drain, join = trial["rows"]
    assert [row["fault"] for row in trial["rows"]] == ["worker_kill", "drain", "join"]
    # No steps are lost if the kill hits a checkpoint; the restart proves that there was one.
    assert kill["world_sizes"] == [2, 2]
    assert (drain["world_sizes"][0], drain["world_sizes"][-1]) == (2, 1)
    assert (join["world_sizes"][0], join["world_sizes"][-1]) == (1, 2)
    assert drain["steps_lost"] == join["steps_lost"] == 0
    assert all(row["recovered_seconds"] > 0 for row in trial["rows"])
