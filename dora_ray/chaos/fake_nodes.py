"""Cluster whose nodes are raylets of this machine: Ray's own autoscaler with the node types of a cluster file."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from dora_ray.errors import ClusterError
from dora_ray.ray_internals import FAKE_PROVIDER

# Name of the head and ids of nodes, as expected by the fake provider.
HEAD_TYPE, HEAD_ID = "ray.head.default", "f" * 51 + "00000"
# Cores of a fake node, and the most nodes. Like a worker with a GPU, a training worker fits only on a train node; a
# film of a few segments should need several decode nodes.
CORES = {"decode": 2, "train": 4}
MOST = {"decode": 3, "train": 2}
# As on a spot market with one GPU machine at first, and more later. Ray's autoscaler starts no node towards a demand
# that it cannot meet in full, such as an elastic trainer's maximum, so the first node is requested explicitly.
FEW = {"decode": 3, "train": 1}
STORE_BYTES = 200_000_000
# A new train node idles until the workers have saved and are resized onto it: half a minute on a busy machine.
IDLE_MINUTES = 0.75
END_SECONDS = 30.0


def scaled_down(
    cluster: Mapping[str, Any],
    gcs_address: str,
    most: Mapping[str, int] = MOST,
    fewest: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Convert a cluster file's node types to fake nodes of this machine.

    Args:
        cluster: content of cluster.yaml.
        gcs_address: host:port at which the head will listen.
        most: maximum nodes by type, further limited by the file.
        fewest: minimum nodes by type, overriding the file.
    """
    types = cluster["available_node_types"]
    head = cluster["head_node_type"]
    nodes = {HEAD_TYPE: {"resources": {"CPU": 0}, "labels": types[head]["labels"], "node_config": {}, "max_workers": 0}}
    for name, node in types.items():
        if name != head:
            nodes[name] = {
                "resources": {"CPU": CORES[name], "object_store_memory": STORE_BYTES},
                "labels": node["labels"],
                "node_config": {},
                "min_workers": (fewest or {}).get(name, node["min_workers"]),
                "max_workers": min(most[name], node["max_workers"]),
            }
    commands = ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    return {
        "cluster_name": cluster["cluster_name"],
        "max_workers": cluster["max_workers"],
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": FAKE_PROVIDER,
            "foreground_node_launch": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
        },
        "docker": {},
        "auth": {},
        "head_node_type": HEAD_TYPE,
        "available_node_types": nodes,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in (*lists, *commands)},
    }


@contextmanager
def fake_cluster(cluster: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Start a head with the autoscaler and no other node; yield its address, and end all its processes."""
    import ray

    with socket.create_server(("", 0)) as free, socket.create_server(("", 0)) as other:
        port, client_port = free.getsockname()[1], other.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    file = offer(cluster, folder, address, FEW)
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        # As `ray up` does; otherwise the first job of a cluster without workers is refused.
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_worker_niceness": "0",
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "4",
    }
    ray_command = Path(sys.executable).with_name("ray")
    command = [str(ray_command), "start", "--head", f"--port={port}", "--num-cpus=0", "--block"]
    command += ["--include-dashboard=false", f"--object-store-memory={STORE_BYTES}", f"--autoscaling-config={file}"]
    command += ["--disable-usage-stats", "--labels=role=head", f"--ray-client-server-port={client_port}"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        end_session(head)


def offer(
    cluster: Mapping[str, Any],
    folder: Path,
    address: str,
    most: Mapping[str, int],
    fewest: Mapping[str, int] | None = None,
) -> Path:
    """Write the autoscaler's file, see `scaled_down`; the autoscaler rereads it continually."""
    new, file = folder / "autoscaling.new.yaml", folder / "autoscaling.yaml"
    new.write_text(yaml.safe_dump(scaled_down(cluster, address, most, fewest)))
    return new.replace(file)


def end_session(leader: subprocess.Popen[bytes]) -> None:
    """Kill a session's leader and all remaining processes of the session.

    A process group is not enough: Ray's workers have their own groups, and orphaned raylets get other parents.

    Raises:
        ClusterError: some processes survive.
    """
    deadline = time.monotonic() + END_SECONDS
    while left := [process for process in psutil().process_iter() if _is_of(process, leader.pid)]:
        if time.monotonic() > deadline:
            raise ClusterError(f"processes that do not end: {', '.join(str(process.pid) for process in left)}")
        for process in left:
            with suppress(psutil().Error):
                process.kill()
        leader.poll()  # a zombie counts until it is reaped
        time.sleep(0.05)


def _is_of(process: Any, session: int) -> bool:
    """Return whether a process is alive and in the session."""
    with suppress(ProcessLookupError, PermissionError, psutil().Error):
        return os.getsid(process.pid) == session and process.status() != psutil().STATUS_ZOMBIE
    return False


def psutil() -> Any:
    """Return the module, which has no types."""
    return importlib.import_module("psutil")  # Ray brings it along


def processes_of(address: str) -> list[tuple[Any, str]]:
    """Return the cluster's processes with their node types; each raylet comes before its children.

    The machine's processes are read in one pass, since this runs every second beside the work of all nodes. `info` of
    each process has its name and command line.
    """
    port = address.rpartition(":")[2]
    below: dict[int, list[Any]] = {}
    for process in psutil().process_iter(["name", "cmdline", "ppid"]):
        below.setdefault(process.info["ppid"], []).append(process)
    found = []
    for raylet in [process for siblings in below.values() for process in siblings]:
        with suppress(psutil().Error):
            if raylet.info["name"] == "raylet" and any(port in word for word in raylet.info["cmdline"] or ()):
                kind = raylet.environ().get("RAY_NODE_TYPE_NAME", HEAD_TYPE)
                found += [(process, kind) for process in (raylet, *_descendants(raylet.pid, below))]
    return found


def _descendants(pid: int, below: Mapping[int, list[Any]]) -> Iterator[Any]:
    for child in below.get(pid, ()):
        yield child
        yield from _descendants(child.pid, below)
