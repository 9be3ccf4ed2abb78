"""Spare processes: a restarted training worker gets a process that is already running, with its modules imported.

Most of a restart is spent starting Python, Ray, torch and timm: 10 to 40 CPU seconds for a group of workers on two
cores. A raylet can start processes ahead of time, through an interface that Ray uses itself, and gives such a process
to the next actor with the same environment. This is only an optimization: if it fails, workers start the usual way.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from dora_ray.ray_internals import SETUP_HOOK, start_processes

logger = logging.getLogger(__name__)

# Makes a worker's process call `preload` first.
ENVIRONMENT = {SETUP_HOOK: f"{__name__}.preload"}
# Longer than any run. Without it the raylet would stop idle processes to make room; all of them end with the job.
KEPT_SECONDS = 90 * 24 * 3600


def preload() -> None:
    """Import the modules of a training worker."""
    for name in ("ray.train.torch", "dora_ray.training.worker", "tensorboardX"):
        importlib.import_module(name)


def environment() -> str:
    """Return this process's runtime environment in the form that raylets compare; also called in workers."""
    import ray

    return str(ray.get_runtime_context().get_runtime_env_string())


def start_spares(node: dict[str, Any], runtime_environment: str, count: int) -> None:
    """Start spare processes for future workers on a node.

    Args:
        node: the node's entry in `ray.nodes()`.
        runtime_environment: the workers' runtime environment, see `environment`.
        count: number of processes.
    """
    why_not = start_processes(node, runtime_environment, count, keep_seconds=KEPT_SECONDS)
    if why_not:
        logger.warning("no spare worker on %s: %s", node["NodeManagerAddress"], why_not)
