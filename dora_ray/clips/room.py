"""CPUs and memory of the cluster available to the clip stream."""

from __future__ import annotations

import logging
from typing import Any

import ray

logger = logging.getLogger(__name__)

# Share of the object store for slots that are ready or in flight.
READY_SHARE = 0.3
# Share of READY_SHARE that the ranks may prefetch. The rest is for tasks: prefetched rows that filled it would block
# the reading of new ones.
PREFETCHED_SHARE = 0.5


def rows_that_fit(wanted: int, row_bytes: int, world_size: int, store_bytes: float) -> int:
    """Return how many rows each rank prefetches: those wanted, or fewer if the object store is small; at least one.

    Args:
        wanted: rows.
        row_bytes: size of a row.
        world_size: number of ranks.
        store_bytes: size of the cluster's object store.
    """
    room = PREFETCHED_SHARE * READY_SHARE * store_bytes
    return max(1, min(wanted, int(room / (world_size * row_bytes))))


def nodes(label: str | None) -> list[dict[str, Any]]:
    """Return the living nodes; with a label, only those whose label `role` has that value."""
    return [node for node in ray.nodes() if node["Alive"] and label in (None, node["Labels"].get("role"))]


def store_bytes() -> float:
    """Return the size of the cluster's object store."""
    return float(ray.cluster_resources().get("object_store_memory", 0.0))


def free_cpus() -> dict[str, float]:
    """Return each node's CPUs that no placement group (such as the training workers') reserves.

    Computed from reservations, because the CPUs free at this moment do not predict those free later.
    """
    from ray.util import placement_group_table

    left = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in nodes(None)}
    for group in placement_group_table().values():
        for index, node in group["bundles_to_node_id"].items() if group["state"] == "CREATED" else ():
            if node in left:
                left[node] -= group["bundles"][index].get("CPU", 0.0)
    return left


def has_room(cpus: float) -> bool:
    """Return whether some node has this many unreserved CPUs.

    If the training workers reserve every CPU, a task that asks for one would never start; it runs beside them.
    """
    if max(free_cpus().values(), default=0.0) >= cpus:
        return True
    logger.warning(
        "the training workers reserve every CPU, so clip reading shares their CPUs; lower "
        "cluster.cpus_per_worker, or add decode nodes"
    )
    return False
