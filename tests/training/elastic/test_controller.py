"""What leans on Ray's developer interface works with the Ray that is pinned; whole interruptions are in tests/chaos."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dora_ray.training.elastic import controller as elastic
from dora_ray.training.elastic.spares import environment, start_spares

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
    assert not elastic.draining_nodes()
    assert not elastic._unreachable(ray_cluster.nodes())
    gone = ray_cluster.nodes()[0] | {"NodeManagerPort": 1}
    assert elastic._unreachable([gone]) == elastic._alive()


def test_the_earliest_deadline_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two nodes is drained without a deadline, which Ray tells as 0; then both are."""
    asked: list[float] = []
    worker = SimpleNamespace(execute_async=lambda call, request, reason, deadline: asked.append(deadline))
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node), **vars(worker)) for node in "ab"]
    draining = {"a": 0, "b": round(time.time() + 10) * 1000, "elsewhere": 1000}
    monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: draining)
    callback = elastic.Elastic(str(tmp_path), fast=False, spares=False, patience=1.0)
    for _ in range(2):
        callback._announce_drains(workers)
    assert asked == [draining["b"] / 1000] * 2, "each worker is told once"
    draining["b"] = 0
    callback._announce_drains(workers)
    assert asked[2] == pytest.approx(time.time() + elastic.DEFAULT_PREEMPTION_DEADLINE_S, abs=5)


def test_memory_that_ran_out_names_the_slot_size() -> None:
    from ray.exceptions import OutOfMemoryError

    assert "lower optim.clips_per_slot" in elastic.describe(OutOfMemoryError("Task was killed due to memory pressure"))
    assert elastic.describe(ValueError("one\ntwo")) == "two"


def test_no_worker_is_counted_onto_a_node_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ScalingConfig

    policy = elastic.StayingNodes(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2}))
    reserved = {"a": {"CPU": 4.0}, "b": {"CPU": 5.0}, "c": {"CPU": 1.0}}
    alive = {"a", "b", "c"}
    monkeypatch.setattr(elastic, "_alive", lambda: alive)
    monkeypatch.setattr(elastic, "draining_nodes", dict)
    assert policy._count_possible_workers(reserved) == 4
    monkeypatch.setattr(elastic, "draining_nodes", lambda: {"b": time.time() + 3600})
    assert policy._count_possible_workers(reserved) == 2
    alive.remove("a")
    assert policy._count_possible_workers(reserved) == 0


def test_a_group_leaves_a_drained_node_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where enough workers stay; else Ray Train waits for the deadline. The interval between resizes does not count."""
    from ray.train import ScalingConfig

    def decide(fewest: int, draining: dict[str, float]) -> int | None:
        scaling = ScalingConfig(
            num_workers=(fewest, 2), resources_per_worker={"CPU": 2}, elastic_resize_monitor_interval_s=3600
        )
        policy = elastic.StayingNodes(scaling)
        monkeypatch.setattr(policy, "_get_reserved_resources", lambda: reserved)
        monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
        monkeypatch.setattr(elastic, "draining_nodes", lambda: draining)
        decision = policy.make_decision_for_running_worker_group(group, None)
        return getattr(decision, "num_workers", None)

    monkeypatch.setattr(elastic, "_alive", lambda: set("abc"))
    homes = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in "ab"]
    group = SimpleNamespace(workers=homes, num_workers=2, start_time=time.monotonic())
    reserved = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}
    assert decide(1, {}) is None
    assert decide(1, {"elsewhere": 0.0}) is None
    assert decide(1, {"b": time.time() + 3600}) == 1
    assert decide(2, {"b": time.time() + 3600}) is None
    reserved["c"] = {"CPU": 2.0}
    assert decide(2, {"b": time.time() + 3600}) == 2
