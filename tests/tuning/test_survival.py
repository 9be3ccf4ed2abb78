"""Sweeps that are killed: the whole process, a trial's driver, a trial's worker. Each ends with the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from dora_ray.training.records.journal import read_events, read_metrics
from dora_ray.tuning.progress import summarize_sweep
from dora_ray.tuning.results import read_csv
from dora_ray.tuning.sweep import sweep

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.ray]

# What depends on the clock and not on the training.
TIMES = ("seconds", "per_second")
PATIENCE_SECONDS = 300


def _numbers(folder: Path) -> dict[str, dict[str, float]]:
    rows = read_csv(str(folder / "results.csv"))
    return {row.name: {name: value for name, value in row.metrics.items() if not name.endswith(TIMES)} for row in rows}


def _spec(small, *, objects=(1, 2), steps: int, workers: int = 0) -> dict:
    return {
        "overrides": [*small, f"optim.steps={steps}", f"cluster.num_workers={workers}", "run.checkpoint_seconds=0.5"],
        "space": {"tracking.num_objects": list(objects)},
        "seeds": [0, 1],
    }


def _wait(condition, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process is None or process.poll() is None, "it ended too soon"
        assert time.monotonic() < end
        time.sleep(0.2)


def _run_in_a_process(spec: dict, folder: Path, tmp_path: Path, *words: str) -> subprocess.Popen:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(spec | {"overrides": list(spec["overrides"])}))
    command = [sys.executable, "-m", "dora_ray", "sweep", str(file), "--out", str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _ended(folder: Path) -> int:
    found = [json.loads(path.read_text()) for path in folder.glob("trials/*/status.json")]
    return sum(status.get("state") == "done" for status in found)


def test_a_killed_sweep_is_dead_and_its_resume_ends_with_the_same_table(small, tmp_path):
    spec = _spec(small, objects=(1, 2, 3, 4), steps=20) | {"max_concurrent_trials": 2}
    whole = _run_in_a_process(spec, tmp_path / "whole", tmp_path)
    out, _ = whole.communicate(timeout=2 * PATIENCE_SECONDS)
    assert whole.returncode == 0, out
    assert len({_driver(run) for run in (tmp_path / "whole" / "trials").iterdir()}) < 8, "processes are used again"
    killed = _run_in_a_process(spec, tmp_path / "killed", tmp_path)
    _wait(lambda: _ended(tmp_path / "killed") >= 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = _ended(tmp_path / "killed")
    assert done < 8, "it was killed in the middle"
    assert summarize_sweep(str(tmp_path / "killed"))["state"] == "dead"
    resumed = _run_in_a_process(spec, tmp_path / "killed", tmp_path, "--resume")
    out, _ = resumed.communicate(timeout=2 * PATIENCE_SECONDS)
    assert resumed.returncode == 0, out
    assert f"{8 - done} of 8 trials to run" in out or f"{7 - done} of 8 trials to run" in out
    assert summarize_sweep(str(tmp_path / "killed"))["state"] == "done"
    assert len(_numbers(tmp_path / "whole")) == 8
    assert _numbers(tmp_path / "killed") == _numbers(tmp_path / "whole")


def _kill_once(folder: Path, at_step: int, find) -> threading.Thread:
    """Kill the process that `find` names when the first trial has come to a step."""

    def kill() -> None:
        (run,) = _first(folder)
        _wait(lambda: any(line["step"] >= at_step for line in read_metrics(str(run))))
        os.kill(find(run), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def _first(folder: Path) -> list[Path]:
    _wait(lambda: any(folder.glob("trials/*/metrics.jsonl")))
    return [sorted(folder.glob("trials/*/metrics.jsonl"))[0].parent]


def _worker(run: Path) -> int:
    return int([line for line in read_events(str(run)) if line["event"] == "start"][-1]["pid"])


def _driver(run: Path) -> int:
    return int(json.loads((run / "heartbeat.json").read_text())["pid"])


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("workers", "victim"), [(1, _worker), (1, _driver), (0, _driver)])
def test_a_trial_whose_process_is_killed_finishes_by_itself_with_the_same_numbers(small, tmp_path, workers, victim):
    spec = _spec(small, objects=(2,), steps=80, workers=workers) | {"max_concurrent_trials": 1, "seeds": [0]}
    sweep(spec, out=tmp_path / "whole")
    killer = _kill_once(tmp_path / "hurt", 10, victim)
    result = sweep(spec, out=tmp_path / "hurt")
    killer.join()
    assert [row.status for row in result.results] == ["done"]
    (run,) = (tmp_path / "hurt" / "trials").iterdir()
    starts = [line for line in read_events(str(run)) if line["event"] == "start"]
    assert len(starts) > 1, "it began again"
    assert starts[-1]["step"] > 0, "from its checkpoint"
    assert _numbers(tmp_path / "hurt") == _numbers(tmp_path / "whole")


def test_two_cores_and_eight_trials_with_workers_never_wait_for_each_other(small, tmp_path):
    spec = _spec(small, objects=(1, 2, 3, 4), steps=3, workers=1)
    spec["overrides"] += ["cluster.cpus_per_worker=1"]
    code = (
        "import json, sys, ray; from dora_ray.tuning.sweep import sweep\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "print([row.status for row in sweep(json.loads(sys.argv[1]), out=sys.argv[2]).results])\n"
    )
    words = [sys.executable, "-c", code, json.dumps(spec), str(tmp_path / "sweep")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS, check=False)
    assert "['done', 'done', 'done', 'done', 'done', 'done', 'done', 'done']" in done.stdout, done.stderr[-3000:]
