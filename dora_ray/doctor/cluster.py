"""Checks of a whole cluster: the facts of its nodes, compared."""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence

from dora_ray.cluster.nodes import NodeFacts, look_at_nodes
from dora_ray.cluster.starting import AUTH_MODE, join_cluster
from dora_ray.doctor.finding import Finding

GIB = 2**30
NEEDED_DISK = 5 * GIB
# S3 rejects requests signed 15 minutes off; times in events.jsonl become confusing much earlier.
CLOCK_SECONDS = 2.0
ANSWER_SECONDS = 5.0
UNAUTHORIZED = (401, 403)


def examine_cluster(address: str, paths: Sequence[str]) -> list[Finding]:
    """Join a cluster, query all its nodes, and return the checks.

    Args:
        address: as in RAY_ADDRESS.
        paths: files, folders or URIs that every node must be able to read.

    Raises:
        ClusterError: the cluster cannot be joined; the message gives the reason.
    """
    import ray

    context = join_cluster(address, log_to_driver=False, logging_level="error")
    try:
        nodes = look_at_nodes(paths)
        url = context.dashboard_url
        return [*compare(nodes), _dashboard(url)]
    finally:
        ray.shutdown()


def compare(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Return the checks of the nodes' facts."""
    silent = {node.name: node.problem for node in nodes if node.problem}
    answered = [node for node in nodes if not node.problem]
    found = Finding(
        "nodes",
        not silent,
        f"{len(nodes)}: {', '.join(node.name for node in nodes)}" + _listed("; no answer from", silent),
        "look at the node's log, /tmp/ray/session_latest/logs/raylet.out; end and replace it if it stays silent",
    )
    checks = (_versions, _gpus, _shared_memory, _disk, _storage, _clocks)
    return [found, *(check(answered) for check in checks)]


def _listed(words: str, items: Mapping[str, object]) -> str:
    return f"{words} " + "; ".join(f"{name}: {value}" for name, value in items.items()) if items else ""


def _versions(nodes: Sequence[NodeFacts]) -> Finding:
    """List the versions that differ, and the nodes that have each."""
    skewed = []
    for package in sorted({package for node in nodes for package in node.versions}):
        having = defaultdict(list)
        for node in nodes:
            having[node.versions.get(package) or "none"].append(node.name)
        if len(having) > 1:
            who = "; ".join(f"{number} on {', '.join(names)}" for number, names in having.items())
            skewed.append(f"{package} {who}")
    text = " | ".join(skewed) or ", ".join(f"{name} {number}" for name, number in _common(nodes))
    return Finding("versions", not skewed, text, "build one image from requirements.lock and use it on every node")


def _common(nodes: Sequence[NodeFacts]) -> list[tuple[str, str | None]]:
    return [(name, number) for name, number in (nodes[0].versions if nodes else {}).items() if number]


def _gpus(nodes: Sequence[NodeFacts]) -> Finding:
    having = {node.name: ", ".join(node.gpus) + f" (NCCL {node.nccl})" for node in nodes if node.gpus}
    blind = {node.name: f"{node.gpu_files} GPUs, torch uses none" for node in nodes if node.gpu_files > len(node.gpus)}
    several = {node.nccl for node in nodes if node.nccl}
    text = _listed("", having).strip() or "none: training runs on CPUs"
    text += _listed("; idle:", blind) + (f"; several NCCL: {', '.join(sorted(several))}" if len(several) > 1 else "")
    remedy = "use the CUDA image on GPU nodes (nvidia-smi there shows the driver), the same on all"
    return Finding("GPUs", (not blind and len(several) < 2) if having or blind else None, text, remedy)


def _shared_memory(nodes: Sequence[NodeFacts]) -> Finding:
    small = {
        node.name: f"/dev/shm {node.shm_bytes / GIB:.1f} GiB, object store {node.object_store_bytes / GIB:.1f} GiB"
        for node in nodes
        if node.shm_bytes and node.shm_bytes < node.object_store_bytes
    }
    total = sum(node.object_store_bytes for node in nodes) / GIB
    return Finding(
        "object store",
        not small,
        f"{total:.1f} GiB on all nodes" + _listed("; too little shared memory on", small),
        "give the container --shm-size at least as large as the object store, or Ray writes its objects to disk",
    )


def _disk(nodes: Sequence[NodeFacts]) -> Finding:
    full = {
        node.name: f"{free / GIB:.1f} GiB at {folder}"
        for node in nodes
        for folder, free in node.free_bytes.items()
        if free < NEEDED_DISK
    }
    least = min((free for node in nodes for free in node.free_bytes.values()), default=0) / GIB
    remedy = f"free {NEEDED_DISK / GIB:.0f} GiB there, or set RAY_TMPDIR to a larger disk before Ray starts"
    return Finding("disks", not full, f"at least {least:.1f} GiB free" + _listed("; nearly full:", full), remedy)


def _storage(nodes: Sequence[NodeFacts]) -> Finding:
    bad = {node.name: _listed("", node.unreachable).strip() for node in nodes if node.unreachable}
    return Finding(
        "storage",
        not bad,
        _listed("not readable on", bad) or "readable on every node, as far as paths were given",
        "videos, store and run must be at the same path on every node: a shared file system, s3:// or gs://",
    )


def _clocks(nodes: Sequence[NodeFacts]) -> Finding:
    off = {
        node.name: f"{node.clock_seconds:+.1f} s"
        for node in nodes
        if abs(node.clock_seconds) > CLOCK_SECONDS + node.clock_error
    }
    largest = max((abs(node.clock_seconds) for node in nodes), default=0.0)
    text = f"within {largest:.2f} s of this machine's" + _listed("; off on", off)
    return Finding("clocks", not off, text, "run chrony or systemd-timesyncd there: object stores reject wrong times")


def _dashboard(url: str | None) -> Finding:
    """Check that Ray's dashboard, through which jobs are started, is not open to the network."""
    if not url:
        return Finding("dashboard", None, "none is running: no jobs can be submitted")
    host = url.rpartition(":")[0].strip("[]")
    status = _ask(f"http://{url}/api/jobs/")
    asks = status in UNAUTHORIZED
    text = f"{url} answers {status or 'nothing'} without a token"
    if _is_loopback(host) and asks:
        return Finding("dashboard", True, f"{text}, and only on the head itself")
    remedy = f"start the head with --dashboard-host=127.0.0.1 and {AUTH_MODE}=token, and tunnel to it (ray dashboard)"
    return Finding("dashboard", _is_loopback(host) and status == 0, text, remedy)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ask(url: str) -> int:
    """Return the status of an anonymous request, sent past any proxy; 0 if unanswered."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)
    except OSError:
        return 0
