"""Ray cluster of several nodes on this machine, whose nodes can be killed, drained and added.

Every node is its own raylet, as on separate machines; all share the cores. The head has no CPUs: like the head of
cluster.yaml, it holds only the control plane, the driver and Ray Train's controller, so faults hit what a real cluster
would lose. Call methods from the main thread only, because Ray installs signal handlers.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from dora_ray.cluster.starting import SYSTEM_CONFIG, prepare_ray
from dora_ray.ray_internals import actors_of, draining_nodes_of, known_address, nodes_of, note_address
from dora_ray.spot import drain

OBJECT_STORE_BYTES = 150_000_000
# A training worker takes two (chaos.training), so that two of them never share a node.
NODE_CPUS = 3
TRAIN_WORKER = "RayTrainWorker"
# Detection time of a dead raylet: 4 missed health checks, a second apart (Ray's default: 5, 3 s apart).
HEAD_SETTINGS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 4,
    **SYSTEM_CONFIG,
}


class LocalNodes:
    """Cluster that lives as long as the context is open.

    Args:
        count: initial nodes, besides the head.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._cluster: Any = None
        self._address_before: str | None = None

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_worker_niceness", "0")
        from ray.cluster_utils import Cluster

        prepare_ray(starts=True)
        logging.getLogger("ray").setLevel(logging.WARNING)
        self._address_before = known_address()
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": HEAD_SETTINGS})
        for _ in range(self._count):
            self.join()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cluster.shutdown()
        if self._address_before:  # restore the address of an earlier `ray start`, for address="auto"
            note_address(self._address_before)

    @property
    def address(self) -> str:
        """Value for RAY_ADDRESS."""
        return str(self._cluster.gcs_address)

    def __len__(self) -> int:
        return len(self._cluster.worker_nodes)

    def join(self) -> None:
        """Add a node with room for one training worker and for tasks beside it."""
        self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=OBJECT_STORE_BYTES)

    def node_ids(self, *, alive: bool = False) -> list[str]:
        """Return the ids of the nodes besides the head; with `alive`, only those that Ray considers alive."""
        living = nodes_of(self._cluster) if alive else None
        return [node.node_id for node in self._cluster.worker_nodes if living is None or node.node_id in living]

    def draining(self) -> dict[str, int]:
        """Return the draining nodes, with their deadlines in milliseconds since the epoch."""
        return draining_nodes_of(self._cluster)

    def train_workers(self) -> dict[str, list[int]]:
        """Return the process ids of the living training workers, by node id."""
        found: dict[str, list[int]] = {}
        for node, pid in actors_of(self._cluster, TRAIN_WORKER):
            found.setdefault(node, []).append(pid)
        return found

    def pick(self, draw: float) -> Any:
        """Return a node that runs a training worker."""
        busy = self.train_workers()
        nodes = sorted((node for node in self._cluster.worker_nodes if node.node_id in busy), key=lambda n: n.node_id)
        return nodes[int(draw * len(nodes))]

    def signal_worker(self, draw: float, number: signal.Signals) -> None:
        """Send a signal to a training worker: SIGKILL ends it, SIGSTOP makes it hang."""
        pids = sorted(pid for pids in self.train_workers().values() for pid in pids)
        os.kill(pids[int(draw * len(pids))], number)

    def kill_node(self, node: Any) -> None:
        """Send SIGKILL to a node's raylet and training workers, as if the machine were lost."""
        workers = self.train_workers().get(node.node_id, [])
        self._cluster.remove_node(node, allow_graceful=False)
        for pid in workers:
            with suppress(ProcessLookupError):  # it may have exited after its raylet
                os.kill(pid, signal.SIGKILL)

    def drain(self, node: Any, seconds: float) -> float:
        """Announce that a node will leave in `seconds`; return the deadline as time.time()."""
        drain(self.address, node.node_id, seconds=seconds, reason="chaos")
        return time.time() + seconds
