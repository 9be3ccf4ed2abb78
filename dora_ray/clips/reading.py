"""Preparation of a decode process before its first task.

Ray cancels a dataset's tasks by interrupting their processes, which then serve the next dataset. An interrupt
during an import would break such a process for good: a half-imported compiled module cannot be imported again.
"""

from __future__ import annotations

import importlib

from dora_ray.ray_internals import SETUP_HOOK


def prepare() -> None:
    """Import the modules that decode tasks need. Called when a worker process starts."""
    for name in ("torch", "dora_ray.clips.dataset", "dora_ray.clips.slot"):
        importlib.import_module(name)


# Runtime environment of decode tasks.
ENVIRONMENT = {"env_vars": {SETUP_HOOK: f"{__name__}.{prepare.__name__}"}}
