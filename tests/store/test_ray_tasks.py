"""Job of tasks as shown in Ray's dashboard."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest

from dora_ray.store import ray_tasks
from dora_ray.store.segments import ingest_segment

SEGMENT = functools.partial(ingest_segment, store="/store", decoder="pyav", form=None)


def halve(item: str) -> dict[str, Any]:
    return {"half": int(item) / 2}


@pytest.mark.ray
@pytest.mark.parametrize(("task", "name"), [(SEGMENT, "Map(ingest_segment)"), (halve, "Map(halve)")])
def test_the_operator_has_the_name_of_its_task(task, name: str, ray_cluster, capsys: pytest.CaptureFixture) -> None:
    ray_tasks._dataset(["a", "b"], task, {}, None).explain()
    plan = capsys.readouterr().out
    assert f"TaskPoolMapOperator[{name}]" in plan
    assert "lambda" not in plan


@pytest.mark.ray
def test_a_task_is_given_its_item(ray_cluster) -> None:
    found = ray_tasks.run_tasks(["1", "3"], halve, node_label=None, patience_seconds=300.0)
    assert sorted(result["half"] for result in found) == [0.5, 1.5]


LEFT = """
import threading, time
from dora_ray.store.ray_tasks import ray_cluster, run_tasks

def nap(item):
    time.sleep(float(item))
    return {"slept": item}

def never(item):
    raise AssertionError

with ray_cluster():
    stop = threading.Event()
    results = run_tasks([*"000000", "3600"], nap, node_label=None, patience_seconds=3600.0, stop=stop)
    assert next(results) == {"slept": "0"}
    stop.set()
    assert len(list(results)) < 6
    assert list(run_tasks(["0"], never, node_label="nowhere", patience_seconds=3600.0, stop=stop)) == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "dora-ray-tasks"] == []
print("left")
"""


@pytest.mark.ray
def test_a_job_that_is_left_ends_before_ray_does() -> None:
    """Amid its work, and before it began.

    Otherwise the loop of the abandoned job searches for Ray for a minute, and then kills the whole process.
    """
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    command = [sys.executable, "-c", LEFT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("left")
    assert "Traceback" not in done.stdout + done.stderr
