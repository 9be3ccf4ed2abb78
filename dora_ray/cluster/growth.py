"""Resources that a cluster has, and those that its autoscaler may add."""

from __future__ import annotations

from dora_ray.ray_internals import most_resources


def resources_within_reach() -> dict[str, float]:
    """Return the resources by name that the cluster has now, or could have with all nodes that its node types allow."""
    import ray

    found: dict[str, float] = dict(ray.cluster_resources())
    for name, most in most_resources().items():
        found[name] = max(found.get(name, 0.0), most)
    return found
