"""What leans on Ray's developer interface works with the Ray that is pinned; whole interruptions are in tests/chaos."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import pytest

from dora_ray.training import elastic
from dora_ray.training.spares import environment, start_spares

pytestmark = pytest.mark.ray


def worker_pids() -> set[int]:
    """Processes of the cluster that run, or wait for, tasks and actors."""
    import psutil  # Ray brings it along

    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if child.name().startswith("ray::")}


def test_a_spare_becomes_the_next_worker(ray_cluster: Any) -> None:
    ray = ray_cluster

    @ray.remote(num_cpus=0.1, runtime_env={"env_vars": {"DORA_RAY_TEST": "spare"}})
    class Worker:
        def describe(self) -> tuple[int, str]:
            return os.getpid(), environment()

    first = Worker.remote()
    pid, runtime_environment = ray.get(first.describe.remote())
    before = worker_pids()
    assert pid in before
    start_spares(ray.nodes()[0], runtime_environment, 1)
    deadline = time.monotonic() + 60
    while not (spares := worker_pids() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(spares) == 1
    second = Worker.remote()
    assert ray.get(second.describe.remote())[0] in spares
    ray.kill(first)
    ray.kill(second)


def test_resources_are_counted_on_demand(ray_cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    with caplog.at_level(logging.WARNING):
        elastic._count_again(wait=True)
    assert not caplog.records
    del coordinator


def test_no_node_is_lost_or_leaving(ray_cluster: Any) -> None:
    assert len(elastic._alive()) == 1
    assert not elastic._draining()
    assert not elastic._unreachable(ray_cluster.nodes())
    gone = ray_cluster.nodes()[0] | {"NodeManagerPort": 1}
    assert elastic._unreachable([gone]) == elastic._alive()


def test_memory_that_ran_out_names_the_slot_size() -> None:
    from ray.exceptions import OutOfMemoryError

    assert "lower optim.clips_per_slot" in elastic.describe(OutOfMemoryError("Task was killed due to memory pressure"))
    assert elastic.describe(ValueError("one\ntwo")) == "two"
