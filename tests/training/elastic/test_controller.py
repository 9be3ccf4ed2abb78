"""What leans on Ray's developer interface works with the Ray that is pinned; whole interruptions are in tests/chaos."""

from __future__ import annotations

import logging
import math
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dora_ray.training.elastic import controller as elastic
from dora_ray.training.elastic.departure import Departure
from dora_ray.training.elastic.requests import Request, here
from dora_ray.training.elastic.spares import environment, start_spares
from dora_ray.training.records.journal import read_lines

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
    callback.departure.not_before = time.monotonic() + 3600
    for _ in range(2):
        callback._announce_drains(workers)
    assert callback.departure.not_before < 0, "a resize has no time to wait for spares"
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

    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2})
    policy = elastic.StayingNodes(scaling, Departure("run"), 1.0)
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
        policy = elastic.StayingNodes(scaling, Departure("run"), 1.0)
        monkeypatch.setattr(policy, "_get_reserved_resources", lambda: reserved)
        monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
        monkeypatch.setattr(elastic, "draining_nodes", lambda: draining)
        decision = policy._wanted(group, None)
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


class Answers:
    """A worker whose answers are given: None trains on, True has left, False has ended; an error has died."""

    def __init__(self, *answers: bool | Exception | None) -> None:
        self._answers, self.reasons = list(answers), []

    def execute_async(self, call: Any, reason: str) -> Any:
        self.reasons.append(reason)

        @ray.remote(num_cpus=0, max_retries=0)
        def answer(given: Any) -> Any:
            if isinstance(given, Exception):
                raise given
            return given

        return answer.remote(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])


def rounds(departure: Departure) -> int:
    """How often a departure was looked at until it was over."""
    count, give_up = 1, time.monotonic() + 60
    while not departure.over():
        count += 1
        assert time.monotonic() < give_up
    return count


def events(run: Path) -> list[dict[str, Any]]:
    return read_lines(str(run / "events.jsonl"))


@pytest.mark.parametrize(
    ("answers", "saved"), [([True, True], True), ([True, False], False), ([True, ValueError("gone")], False)]
)
def test_a_departure_is_over_when_nobody_trains(
    answers: list[Any], saved: bool, ray_cluster: Any, tmp_path: Path
) -> None:
    departure = Departure(str(tmp_path))
    workers = [Answers(None, None, answer) for answer in answers]
    departure.begin(workers, "resize", patience=60.0)
    assert departure.under_way
    assert rounds(departure) >= 3
    assert departure.over(), "and stays over"
    assert [len(worker.reasons) for worker in workers] == [3, 3]
    departure.end()
    assert not departure.under_way
    (event,) = events(tmp_path)
    assert (event["event"], event["reason"], event["saved"]) == ("leave", "resize", saved)


def test_a_departure_ends_with_its_patience_and_begins_when_the_spares_are_ready(
    ray_cluster: Any, tmp_path: Path
) -> None:
    departure, worker = Departure(str(tmp_path)), Answers(None)
    departure.not_before = time.monotonic() + 3600
    departure.begin([worker], "resize", patience=0.0)
    assert not departure.over()
    assert not worker.reasons, "it trains on"
    departure.not_before = -math.inf
    assert departure.over()
    assert worker.reasons == ["resize"]
    departure.begin([worker], "abort", patience=0.0)
    assert departure.over()
    departure.end()
    assert events(tmp_path)[0]["saved"] is False


def test_one_departure_a_run_in_a_process(tmp_path: Path) -> None:
    """Ray Train pickles the scaling policy and the callbacks apart."""
    callback = elastic.Elastic(str(tmp_path), fast=False, spares=False, patience=1.0)
    copies = [pickle.loads(pickle.dumps(callback)) for _ in range(2)]
    assert copies[0].departure is copies[1].departure is callback.departure
    assert callback.departure is not elastic.Elastic("other", fast=False, spares=False, patience=1.0).departure


def test_a_resize_is_decided_when_the_workers_have_left(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the nodes that are there then. Meanwhile Ray Train hears of no drain, for whose deadline it would wait."""
    from ray.train import ScalingConfig

    scaling = ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 2}, elastic_resize_monitor_interval_s=0)
    callback = elastic.Elastic(str(tmp_path), fast=False, spares=False, patience=60.0)
    policy = elastic.StayingNodes(scaling, callback.departure, callback.patience)
    reserved = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: reserved)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(elastic, "_alive", lambda: set("abc"))
    monkeypatch.setattr(elastic, "draining_nodes", dict)
    worker = Answers(None, None, None, True)
    worker.metadata = SimpleNamespace(node_id="a")
    group = SimpleNamespace(workers=[worker], num_workers=1, start_time=-math.inf)
    status = SimpleNamespace(errors={}, worker_statuses={0: SimpleNamespace(preemption_info="the drain of b")})

    def check() -> int | None:
        callback.after_worker_group_poll_status(status)
        return getattr(policy.make_decision_for_running_worker_group(group, status), "num_workers", None)

    assert check() is None
    assert status.worker_statuses[0].preemption_info == "the drain of b"
    assert check() is None
    assert status.worker_statuses[0].preemption_info is None
    reserved["c"] = {"CPU": 2.0}
    give_up = time.monotonic() + 60
    while (decided := check()) is None:
        assert time.monotonic() < give_up
    assert decided == 3
    assert not callback.departure.under_way


def slow_leaver(config: dict[str, Any]) -> None:
    """A training that does nothing, takes 8 s to leave, and is done when it is started anew."""
    from ray.train import get_context

    if Path(config["left"]).exists():
        return
    rank = get_context().get_world_rank()
    while here.pending() is not Request.LEAVE:
        time.sleep(0.05)
    begun = time.time()
    time.sleep(8.0)
    if rank == 0:
        Path(config["left"]).write_text(f"{begun} {time.time()}")
    here.left()
    time.sleep(60.0)


class Watching(elastic.Elastic):
    """Notes every health check; a new node is there once the first was."""

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        super().after_worker_group_poll_status(worker_group_status)
        with open(f"{self._run}/polls", "a") as polls:
            polls.write(f"{time.time()} {self.departure.under_way}\n")


class Growing(elastic.StayingNodes):
    """Has room for one worker, and for two once health checks were made."""

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        return 2 if Path(self._departure._run, "polls").exists() else 1


class GrowingTrainer(elastic.ElasticTrainer):
    def _initialize_and_run_controller(self, **how: Any) -> Any:
        (callback,) = (each for each in how["callbacks"] if isinstance(each, elastic.Elastic))
        how["scaling_policy"] = Growing(self.scaling_config, callback.departure, callback.patience)
        return super(elastic.ElasticTrainer, self)._initialize_and_run_controller(**how)


@pytest.mark.slow
def test_health_is_checked_while_a_worker_takes_its_time_to_leave(ray_cluster: Any, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig

    GrowingTrainer(
        slow_leaver,
        train_loop_config={"left": str(tmp_path / "left")},
        scaling_config=ScalingConfig(
            num_workers=(1, 2), resources_per_worker={"CPU": 0.5}, elastic_resize_monitor_interval_s=1
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(tmp_path),
            callbacks=[Watching(str(tmp_path), fast=False, spares=False, patience=120.0)],
        ),
    ).fit()
    begun, left = map(float, (tmp_path / "left").read_text().split())
    polls = [line.split() for line in (tmp_path / "polls").read_text().splitlines()]
    during = [float(at) for at, under_way in polls if under_way == "True" and begun < float(at) < left]
    assert len(during) >= 5, "every half a second, on a machine that is not busy"
    found = events(tmp_path)
    assert [event["world_size"] for event in found if event["event"] == "group"] == [1, 2]
    (leave,) = (event for event in found if event["event"] == "leave")
    assert leave["saved"]
    assert leave["seconds"] >= 8


def test_an_abort_interrupts_a_resize_that_is_held_back(ray_cluster: Any, tmp_path: Path) -> None:
    """Ctrl-C while the workers are asked to save for a resize: they are asked for the abort, and waited for."""
    callback = elastic.Elastic(str(tmp_path), fast=False, spares=False, patience=3600.0)
    worker = Answers(None, None, None, True)
    callback.after_worker_group_training_start(SimpleNamespace(get_workers=lambda: [worker]))
    callback.departure.begin([worker], "resize", patience=3600.0)
    assert not callback.departure.over()
    callback.before_controller_abort()
    assert worker.reasons == ["resize", *["abort"] * (len(worker.reasons) - 1)]
    (event,) = events(tmp_path)
    assert (event["reason"], event["saved"]) == ("abort", True)
    callback.before_controller_abort()
    assert len(events(tmp_path)) == 1, "there is no group any more"
