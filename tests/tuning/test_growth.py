"""A sweep on a cluster that begins with a head alone: the autoscaler's nodes come for trials that wait.

The nodes are processes of Ray's own fake provider on this machine, started as `ray up` would start machines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.cluster.heads import BIN, OWN_VARIABLES, background, free_ports

HEAD_ID = "f" * 51 + "00000"
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


def _autoscaling(port: int, ip: str) -> dict:
    """An autoscaler's configuration: a head without CPUs, and nodes of two CPUs, none to begin with."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    small = {"CPU": 2, "object_store_memory": 150_000_000}
    return {
        "cluster_name": "fake",
        "max_workers": NODES,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 5,
        "provider": {
            # The type "fake_multinode" needs a file that Ray's wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "foreground_node_launch": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": f"{ip}:{port}",
        },
        "docker": {},
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "trainer": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": NODES},
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_as_many_trials_run_as_the_node_types_allow(small, tmp_path):
    import ray

    ip, (port,) = ray.util.get_node_ip_address(), free_ports(1)
    config = tmp_path / "autoscaling.json"
    config.write_text(json.dumps(_autoscaling(port, ip)))
    environment = {key: value for key, value in os.environ.items() if key not in OWN_VARIABLES} | {
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [
        str(BIN / "ray"), "start", "--head", f"--port={port}", "--num-cpus=0", "--block", "--include-dashboard=false",
        "--object-store-memory=150000000", f"--autoscaling-config={config}", "--disable-usage-stats",
        f"--temp-dir={tempfile.mkdtemp(prefix='ray-')}",
    ]  # fmt: skip
    spec = {
        "overrides": [*small, "cluster.num_workers=1", "cluster.cpus_per_worker=1", "optim.steps=200"],
        "space": {"tracking.num_objects": [1, 2, 3]},
        "seeds": [0, 1],
    }
    with background(command, environment, tmp_path / "head.log"):
        done = _sweep_when_there(spec, tmp_path, environment | {"RAY_ADDRESS": f"{ip}:{port}"})
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
