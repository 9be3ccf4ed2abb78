"""Resources that a cluster has, and those that its autoscaler may add."""

from __future__ import annotations

import importlib
from typing import Any


def resources_within_reach() -> dict[str, float]:
    """Return, by name, what the cluster has now or could have with all nodes that its node types allow."""
    ray: Any = importlib.import_module("ray")
    # Ray has no public way to ask what the autoscaler may add; its own Train and Data ask so. None without one.
    state: Any = importlib.import_module("ray._private.state").state
    found: dict[str, float] = dict(ray.cluster_resources())
    for name, most in (state.get_max_resources_from_cluster_config() or {}).items():
        found[name] = max(found.get(name, 0.0), float(most))
    return found
