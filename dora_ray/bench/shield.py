"""Cost of the ingest's shield: the same decoding in processes with blanked variables, and in ordinary ones.

`python -m dora_ray.bench.shield [ROUNDS]` prints the time and CPU seconds of both on one film, alternating, each in a
new Ray cluster. Other processes disturb CPU seconds less. Ray keeps ordinary processes ready, but must start processes
with their own variables; that is the cost. With 0 rounds it prints what needs no Ray: the CPU seconds of such a start
and the microseconds of a memory limit.
"""

from __future__ import annotations

import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from dora_ray.bench.cluster import cpu_between, cpu_of_all
from dora_ray.bench.films import film
from dora_ray.config import Config, load_config
from dora_ray.store import datasets
from dora_ray.store.ingest import find_indexes
from dora_ray.store.ray_tasks import ray_cluster, run_tasks
from dora_ray.store.segments import find_work, ingest_segment
from dora_ray.store.shield import blanked, memory_limit
from dora_ray.training.inputs import frame_format

FILM: dict[str, Any] = {"width": 3840, "height": 2160, "frames_per_second": 60, "seconds": 10, "group_size": 250}
LOOPS, ROUNDS, LIMITS = 6, 3, 10_000
PATIENCE_SECONDS = 600.0
STARTS, IMPORTS = 5, "ray.data, dora_ray.store.segments, av, lance, simplejpeg"


def run(
    *, rounds: int = ROUNDS, size: Mapping[str, Any] = FILM, loops: int = LOOPS, starts: int = STARTS
) -> dict[str, Any]:
    """Return the medians with and without the shield, ratio and difference, and microseconds of a memory limit.

    Args:
        rounds: number of rounds of both.
        size: size and length of the film's unit, see `films.film`.
        loops: number of repetitions of the unit in the film.
        starts: number of processes whose start is measured.
    """
    found: dict[str, Any] = {"start_cpu_seconds": _start_cpu_seconds(starts), "memory_limit_us": 1e6 * _limit_seconds()}
    if not rounds:
        return found
    path = film(**size, loops=loops)
    measured: dict[str, list[tuple[float, float]]] = {"shielded": [], "plain": []}
    for number in range(rounds):
        for name in sorted(measured, reverse=number % 2 == 0):
            measured[name].append(_ingest(path, size["seconds"], shielded=name == "shielded"))
    for place, unit in enumerate(("seconds", "cpu_seconds")):
        shielded, plain = (statistics.median(each[place] for each in measured[name]) for name in measured)
        found |= {f"shielded_{unit}": shielded, f"plain_{unit}": plain, f"extra_{unit}": shielded - plain}
        found[f"ratio_of_{unit}"] = shielded / plain
    return found | {"film_seconds": size["seconds"] * loops, "rounds": measured}


def _ingest(path: str, segment_seconds: float, *, shielded: bool) -> tuple[float, float]:
    """Return time and CPU seconds from the first task to the last result, in a freshly started Ray cluster."""
    config = load_config("paper", f"data.videos=[{path}]")
    with tempfile.TemporaryDirectory() as store, ray_cluster():
        items = _items(config, path, store, segment_seconds)
        task = functools.partial(
            ingest_segment, store=store, decoder=config.data.decoder, form=frame_format(config.data)
        )
        variables = blanked([path, store], {}) if shielded else None
        used, started = cpu_of_all(), time.perf_counter()
        results = list(run_tasks(items, task, node_label=None, patience_seconds=PATIENCE_SECONDS, variables=variables))
        seconds, cpu_seconds = time.perf_counter() - started, cpu_between(used, cpu_of_all())
    assert len(results) == len(items)
    assert all(result["frames"] and not result["error"] for result in results), results
    return round(seconds, 2), round(cpu_seconds, 2)


def _items(config: Config, path: str, store: str, segment_seconds: float) -> list[str]:
    """Create the store, and return the tasks of the ingest."""
    data = config.data
    work = find_work(
        find_indexes([path], store=store, decoder=data.decoder),
        store=store,
        form=frame_format(data),
        segment_seconds=segment_seconds,
        decode_seconds=data.decode_seconds,
    )
    for uri in sorted({part.uri for part in work}):
        datasets.create_dataset(uri)
    return [json.dumps(vars(part)) for part in work]


def _start_cpu_seconds(starts: int) -> float:
    """Return the median CPU seconds of starting a process and importing what an ingest's task needs."""
    used = []
    for _ in range(starts):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(used)


def _limit_seconds() -> float:
    """Return the seconds of setting and lifting the memory limit, which every task does once."""
    started = time.perf_counter()
    for _ in range(LIMITS):
        with memory_limit():
            pass
    return (time.perf_counter() - started) / LIMITS


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS), indent=1) + "\n")
