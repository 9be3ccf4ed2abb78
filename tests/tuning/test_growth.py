"""A sweep on a cluster that begins with a head alone: the autoscaler's nodes come for trials that wait.

The nodes are processes of Ray's own fake provider on this machine, started as `ray up` would start machines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dora_ray.chaos.fake_nodes import CORES, fake_cluster
from tests.cluster.heads import OWN_VARIABLES

NODES, PATIENCE_SECONDS = 2, 400
SWEEP = """
import json, sys
from dora_ray.tuning.sweep import sweep
most = 0
def look(progress):
    global most
    most = max(most, sum(step > 0 and name not in progress.ended for name, step in progress.reached.items()))
result = sweep(json.loads(sys.argv[1]), out=sys.argv[2], on_progress=look)
print("ENDED", json.dumps({"most": most, "statuses": [row.status for row in result.results]}))
"""


# A head without CPUs, and nodes of two CPUs, none to begin with.
CLUSTER = {
    "cluster_name": "fake",
    "max_workers": NODES,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"labels": {}},
        "decode": {"labels": {}, "min_workers": 0, "max_workers": NODES},
    },
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_as_many_trials_run_as_the_node_types_allow(small, tmp_path, monkeypatch):
    for name in OWN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    spec = {
        "overrides": [*small, "cluster.num_workers=1", "cluster.cpus_per_worker=1", "optim.steps=200"],
        "space": {"tracking.num_objects": [1, 2, 3]},
        "seeds": [0, 1],
    }
    assert CORES["decode"] == 2, "one trial a node: the worker of another would wait for a CPU"
    with fake_cluster(CLUSTER, tmp_path) as address:
        done = _sweep_when_there(spec, tmp_path, os.environ | {"RAY_ADDRESS": address})
    ended = json.loads(done.partition("ENDED ")[2])
    assert ended == {"most": NODES, "statuses": ["done"] * 6}


def _sweep_when_there(spec: dict, folder: Path, environment: dict[str, str]) -> str:
    """Run the sweep as soon as the head answers."""
    words = [sys.executable, "-c", SWEEP, json.dumps(spec), str(folder / "sweep")]
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode == 0 or time.monotonic() > end or "trials to run" in done.stderr:
            assert done.returncode == 0, done.stderr[-4000:] + (folder / "head.log").read_text()[-2000:]
            return done.stdout
        time.sleep(2)
