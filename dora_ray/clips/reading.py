"""Preparation of a decode process before its first task.

Ray ends a dataset's tasks by an interrupt in their processes, which serve the next dataset. An interrupt amid an import
would spoil such a process for good: a compiled module that was half imported cannot be imported again.
"""

from __future__ import annotations

import importlib

from dora_ray.ray_internals import SETUP_HOOK


def prepare() -> None:
    """Import what decode tasks need; called when their process starts."""
    for name in ("torch", "dora_ray.clips.dataset", "dora_ray.clips.slot"):
        importlib.import_module(name)


# The runtime environment of decode tasks.
ENVIRONMENT = {"env_vars": {SETUP_HOOK: f"{__name__}.{prepare.__name__}"}}
