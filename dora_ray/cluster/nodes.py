"""Facts about every node of a cluster, each collected by a task on that node."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dora_ray.errors import ClusterError, DoRAError

# Packages that must match everywhere, because they pickle, decode or compute.
PACKAGES = ("dora-ray", "ray", "torch", "torchvision", "timm", "numpy", "pyarrow", "pylance", "av", "simplejpeg")
ANSWER_SECONDS = 120.0
CLOCK_ROUNDS = 3


@dataclass(frozen=True)
class NodeFacts:
    """Facts about one node.

    Attributes:
        name: role and address.
        versions: versions of Python and the packages; None if missing.
        gpus: names of the GPUs that torch finds.
        gpu_files: number of NVIDIA device files, with or without torch.
        nccl: version of NCCL in torch; None without a GPU.
        shm_bytes: size of /dev/shm; 0 if absent.
        free_bytes: free space by folder.
        unreachable: {path: reason} of paths that this node cannot read.
        clock_seconds: how far its clock is ahead of this process's.
        clock_error: upper bound of the error of `clock_seconds`: half the round trip.
        object_store_bytes: size of Ray's object store.
        problem: why the node did not answer; the other facts are then missing.
    """

    name: str
    versions: dict[str, str | None] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    gpu_files: int = 0
    nccl: str | None = None
    shm_bytes: int = 0
    free_bytes: dict[str, int] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)
    clock_seconds: float = 0.0
    clock_error: float = 0.0
    object_store_bytes: int = 0
    problem: str | None = None


def look_here(paths: Sequence[str]) -> dict[str, Any]:
    """Collect facts about the machine on which this process runs.

    Args:
        paths: files, folders or URIs that must be readable here.
    """
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    gpu_files = len(list(Path("/dev").glob("nvidia[0-9]*")))
    folders = {os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", os.path.expanduser("~")}
    return {
        "versions": {"python": platform.python_version(), **{name: _installed(name) for name in PACKAGES}},
        "gpu_files": gpu_files,
        **(_gpus() if gpu_files else {}),
        "shm_bytes": shm,
        "free_bytes": {folder: shutil.disk_usage(folder).free for folder in sorted(folders) if os.path.isdir(folder)},
        "unreachable": unreadable(paths),
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> dict[str, Any]:
    """Return GPU names and NCCL version; torch may be missing, or built without GPUs."""
    try:
        torch: Any = importlib.import_module("torch")  # torch.cuda.nccl has no types
        names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        nccl = torch.cuda.nccl.version() if names else None
    except (ImportError, RuntimeError, AttributeError):
        return {}
    return {"gpus": names, "nccl": ".".join(map(str, nccl)) if nccl else None}


def unreadable(paths: Sequence[str]) -> dict[str, str]:
    """Return the reasons, by path, of files, folders and URIs that this machine cannot read."""
    return {path: reason.removeprefix(f"{path}: ") for path in paths if (reason := _why_unreadable(path))}


def _why_unreadable(path: str) -> str | None:
    from dora_ray import files

    try:
        if not files.exists(path):
            return "there is no such file or folder"
        if not files.is_remote(path) and not os.access(path, os.R_OK):
            return "it may not be read"
    except (DoRAError, OSError) as error:
        return str(error)
    return None


def look_at_nodes(paths: Sequence[str] = (), *, elsewhere: bool = False) -> list[NodeFacts]:
    """Return the facts about every living node of the connected cluster.

    Args:
        paths: paths that every node must be able to read.
        elsewhere: skip nodes at this machine's address.
    """
    ray: Any = importlib.import_module("ray")  # its functions have no types
    mine = ray.util.get_node_ip_address()
    alive = [node for node in ray.nodes() if node["Alive"]]
    if elsewhere:
        alive = [node for node in alive if node["NodeManagerAddress"] != mine]
    # Importing takes seconds the first time on a node, so all nodes work at once.
    asked = {node["NodeID"]: _task(look_here, node["NodeID"]).remote(list(paths)) for node in alive}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    return [_facts(node, asked[node["NodeID"]]) for node in alive]


def require_alike(paths: Sequence[str]) -> None:
    """Check, before sending work, that the cluster's other nodes match this machine.

    Nodes added later by the autoscaler use the same image and are not checked.

    Args:
        paths: files and folders that every node must be able to read.

    Raises:
        ClusterError: a node cannot read a path, or has another version of a package; the message names it.
    """
    here = look_here(())["versions"]
    for node in look_at_nodes(paths, elsewhere=True):
        if node.unreachable:
            path, reason = next(iter(node.unreachable.items()))
            raise ClusterError(
                f"{node.name} cannot read {path}: {reason}. Videos, store and run must be at the same path on every "
                "node: a shared file system, s3:// or gs://. `dora-ray doctor PATH` checks all nodes"
            )
        other = {name: found for name, found in node.versions.items() if found != here[name]}
        if other:
            name, found = next(iter(other.items()))
            raise ClusterError(
                f"{node.name} has {name} {found or 'not installed'}, this machine {here[name]}: use one image, built "
                "from requirements.lock, on every node and here. `dora-ray doctor` lists all differences"
            )


def _task(function: Any, node_id: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=1)(function).options(scheduling_strategy=there)


def _facts(node: dict[str, Any], asked: Any) -> NodeFacts:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    role = node["Labels"].get("role") or ("head" if "node:__internal_head__" in node["Resources"] else "node")
    name = f"{role} {node['NodeManagerAddress']}"
    try:
        found = ray.get(asked, timeout=0)
        ahead, error = _clock(node["NodeID"])
    except GetTimeoutError:
        return NodeFacts(name, problem=f"no answer within {ANSWER_SECONDS:.0f} s")
    except RayError as failure:
        return NodeFacts(name, problem=" ".join(str(failure).split())[-300:])
    return NodeFacts(
        name,
        **found,
        clock_seconds=ahead,
        clock_error=error,
        object_store_bytes=int(node["Resources"].get("object_store_memory", 0)),
    )


def _now() -> float:
    return time.time()  # Ray takes no built-in functions


def _clock(node_id: str) -> tuple[float, float]:
    """Return the seconds by which a node's clock is ahead, and half the shortest of several round trips."""
    import ray

    task, rounds = _task(_now, node_id), []
    for _ in range(CLOCK_ROUNDS):
        asked = time.time()
        there = ray.get(task.remote(), timeout=ANSWER_SECONDS)
        answered = time.time()
        rounds.append(((answered - asked) / 2, there - statistics.mean((asked, answered))))
    error, ahead = min(rounds)
    return ahead, error
