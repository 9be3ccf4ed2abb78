"""Ray cluster of a measurement, with the CPU time and private memory of its processes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dora_ray.cluster.starting import start_cluster

CORES = 2
# Titles of processes that run tasks: idle, or named after a Ray Data operator.
TASKS = ("IDLE", "Map", "Read", "_read_elsewhere")


Cpu = dict[tuple[int, float], float]
"""CPU seconds of processes, by number and time of start."""


@contextmanager
def cluster() -> Iterator[None]:
    """Use the connected cluster, or start one of CORES CPUs that ends with the block."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    if ray.is_initialized():
        yield
        return
    start_cluster(num_cpus=CORES)
    try:
        yield
    finally:
        ray.shutdown()


def _processes() -> Iterator[Any]:
    """Yield this process and all processes of the Ray cluster that it started."""
    import ray

    assert ray.is_initialized()
    # psutil comes with Ray.
    import psutil

    this = psutil.Process()
    yield from (this, *this.children(recursive=True))


def cpu_of_all() -> Cpu:
    """Return the CPU seconds so far of this process and of each process of its Ray cluster: workers, raylet, head."""
    import psutil

    found: Cpu = {}
    for process in _processes():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
    return found


def cpu_between(before: Cpu, after: Cpu) -> float:
    """Return the CPU seconds between two looks, without what processes used that ended in between: no sum has it."""
    return sum(seconds - before.get(process, 0.0) for process, seconds in after.items())


def memory_by_role() -> dict[str, list[float]]:
    """Return the private memory of each process in MB, by role; object store pages are excluded."""
    import psutil

    found: dict[str, list[float]] = defaultdict(list)
    for process in _processes():
        with suppress(psutil.NoSuchProcess):
            words, memory = process.cmdline(), process.memory_info()
            role = "driver" if process.pid == os.getpid() else role_of(words)
            if role is not None:
                found[role].append((memory.rss - memory.shared) / 2**20)
    return dict(found)


def role_of(words: list[str]) -> str | None:
    """Return a process's role by its command line: actor class, `task`, or program; None while it starts or ends."""
    title = " ".join(words).strip()
    if not title or "default_worker.py" in title:
        return None
    if title.startswith("ray::"):
        name = title.removeprefix("ray::").split(".")[0].strip()
        return "task" if name.startswith(TASKS) else name
    programs = [word for word in words[:3] if not word.startswith("-")]
    script = programs[0].rpartition("/")[2].startswith("python")
    return os.path.basename(programs[-1 if script else 0])
