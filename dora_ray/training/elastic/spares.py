"""Spare processes: a training worker that has to start again finds its process started and its modules imported.

Most of a restart is the start of Python, Ray, torch and timm: 10 to 40 CPU seconds for a group of workers on two cores.
Raylets start processes ahead of time when asked through an interface that Ray uses itself, and give such a process to
the next actor with the same environment. Nothing depends on it: where it fails, a worker starts as it does without.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from dora_ray.ray_internals import SETUP_HOOK, start_processes

logger = logging.getLogger(__name__)

# What a worker's process calls first: `preload` in this module.
ENVIRONMENT = {SETUP_HOOK: f"{__name__}.preload"}
# Longer than any run: an idle process that is not to be kept is ended for another's sake, and all end with the job.
KEPT_SECONDS = 90 * 24 * 3600


def preload() -> None:
    """Import what a training worker needs."""
    for name in ("ray.train.torch", "dora_ray.training.worker", "tensorboardX"):
        importlib.import_module(name)


def environment() -> str:
    """This process's runtime environment, as raylets compare it: what the controller calls in a worker."""
    import ray

    return str(ray.get_runtime_context().get_runtime_env_string())


def start_spares(node: dict[str, Any], runtime_environment: str, count: int) -> None:
    """Have a node start processes for the workers to come.

    Args:
        node: as `ray.nodes()` describes it.
        runtime_environment: of those workers, see `environment`.
        count: processes.
    """
    why_not = start_processes(node, runtime_environment, count, keep_seconds=KEPT_SECONDS)
    if why_not:
        logger.warning("no spare worker on %s: %s", node["NodeManagerAddress"], why_not)
