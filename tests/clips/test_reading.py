"""Decode processes: modules imported before the first task, which may be interrupted."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dora_ray.clips import reading


@pytest.mark.ray
def test_a_task_finds_everything_imported(ray_cluster: Any) -> None:
    """Imports also precede the task's unpickling, because an interrupt may arrive from then on."""
    ray = ray_cluster

    def loaded() -> list[str]:
        import sys

        wanted = ("torch", "av", "lance", "simplejpeg", "numpy", "pyarrow", "ray.data", "dora_ray.clips.slot")
        return [name for name in wanted if name not in sys.modules]

    missing = ray.remote(num_cpus=0, runtime_env=reading.ENVIRONMENT)(loaded)
    assert ray.get(missing.remote(), timeout=300) == []


def test_an_interrupted_import_spoils_a_process() -> None:
    """Show the reason, with torch: an interrupted import breaks the process. If this fails, tasks may import by
    themselves."""
    program = """
import _thread, sys, threading

def interrupt(): _thread.interrupt_main()

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
try:
    import torch
except KeyboardInterrupt:
    pass
try:
    import torch
except BaseException as error:
    sys.exit(0)
sys.exit("imported after all")
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
