"""Every private or developer interface of Ray that is used holds with the Ray that is installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dora_ray import ray_internals

ray_test = pytest.mark.ray
PACKAGE = Path(ray_internals.__file__).parent
PRIVATE = re.compile(
    r"\bray\._private|\bray\._raylet|\bray\.[\w.]*_internal|\bray\.core\b|\bray\.experimental|\bray\.autoscaler"
    r"|\bray\.train\.v2|_internal_kv_|\.global_state\b|\bglobal_worker\b"
)


def private_uses(source: str) -> list[str]:
    """Private Ray in the code of a file, its docstrings and comments left out; names of loggers are code, too."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")
    return PRIVATE.findall(ast.unparse(tree))


@pytest.mark.parametrize(
    "source",
    [
        "import ray._private.worker",
        "from ray.data._internal.execution import x",
        "import ray\nray._private.state.state.nodes()",
        "logging.getLogger('ray.data._internal.progress')",
        "from ray.train.v2.api.config import x",
        "from ray.core.generated import gcs_pb2",
        "store._internal_kv_get('a')",
        "cluster.global_state.nodes()",
    ],
)
def test_private_ray_is_found(source: str) -> None:
    assert private_uses(source)


def test_private_ray_is_in_one_file() -> None:
    """Ruff bans the imports; this finds attributes of unknown objects and strings, too."""
    assert not private_uses('"""Of ray._private, a word."""\nimport ray\nray.get(1)  # ray._private')
    found = {path.relative_to(PACKAGE): private_uses(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert [str(path) for path, uses in found.items() if uses] == ["ray_internals.py"]


def test_importing_it_imports_no_ray() -> None:
    code = "import sys, dora_ray.ray_internals; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(ray_internals._RAYS_OWN))
def test_rays_own_are_where_they_are_said_to_be(name: str) -> None:
    assert getattr(ray_internals, name) is not None


def test_all_of_rays_own_are_exported() -> None:
    assert set(ray_internals.__all__) == ray_internals._RAYS_OWN.keys()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ray_internals.nothing


def test_the_setup_hook_has_rays_name() -> None:
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    assert ray_internals.SETUP_HOOK == WORKER_PROCESS_SETUP_HOOK_ENV_VAR


def test_the_fake_cloud_is_where_it_is_said_to_be() -> None:
    module, _, name = ray_internals.FAKE_PROVIDER.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize(
    ("base", "method", "parameters"),
    [
        ("ControllerCallback", "before_controller_execute_resize_decision", ["resize_decision"]),
        ("ControllerCallback", "before_controller_execute_failure_decision", ["failure_decision"]),
        ("ControllerCallback", "before_controller_abort", []),
        ("WorkerGroupCallback", "before_worker_group_start", ["worker_group_context"]),
        ("WorkerGroupCallback", "after_worker_group_start", ["worker_group"]),
        ("WorkerGroupCallback", "after_worker_group_training_start", ["worker_group"]),
        ("WorkerGroupCallback", "before_worker_group_shutdown", ["worker_group"]),
        ("WorkerGroupCallback", "after_worker_group_poll_status", ["worker_group_status"]),
        (
            "ElasticScalingPolicy",
            "make_decision_for_running_worker_group",
            ["worker_group_state", "worker_group_status"],
        ),
        ("ElasticScalingPolicy", "_count_possible_workers", ["reserved_resources"]),
        ("ElasticScalingPolicy", "_get_reserved_resources", []),
        ("ElasticScalingPolicy", "_get_resize_decision", ["num_workers"]),
        ("ExecutionCallback", "on_execution_step", ["executor"]),
        ("ExecutionCallback", "before_execution_starts", ["executor"]),
    ],
)
def test_what_is_overridden_or_called_is_there(base: str, method: str, parameters: list[str]) -> None:
    signature = inspect.signature(getattr(getattr(ray_internals, base), method))
    assert list(signature.parameters) == ["self", *parameters]


@ray_test
def test_each_turn_is_called_and_can_end_the_execution(ray_cluster: Any) -> None:
    from ray.data import from_items

    turns: list[float] = []
    dataset = from_items([1, 2, 3]).map(lambda row: row)
    dataset.context.enable_progress_bars = False
    ray_internals.call_each_turn(dataset.context, lambda: turns.append(time.monotonic()))
    ray_internals.pace_execution(dataset.context)
    assert sorted(row["item"] for row in dataset.iter_rows()) == [1, 2, 3]
    assert len(turns) >= 2
    assert min(late - early for early, late in itertools.pairwise(turns)) >= ray_internals.PACE_SECONDS

    def end() -> None:
        raise ValueError("enough")

    ended = from_items([1, 2, 3]).map(lambda row: row)
    ended.context.enable_progress_bars = False
    ray_internals.call_each_turn(ended.context, end)
    with pytest.raises(ValueError, match="enough"):
        list(ended.iter_rows())


@ray_test
def test_the_pace_is_kept_where_the_loop_runs_in_an_actor(ray_cluster: Any) -> None:
    from ray.data import range as numbers

    dataset = numbers(4)
    ray_internals.pace_execution(dataset.context)
    (split,) = dataset.streaming_split(1)
    assert sorted(row["id"] for row in split.iter_rows()) == [0, 1, 2, 3]


@ray_test
def test_an_execution_begins_when_the_resources_are_known(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at once an hour, at first before anything is known, nothing would be begun for an hour."""
    from ray.data import range as numbers
    from ray.data._internal.execution.resource_manager import ResourceManager

    monkeypatch.setattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", 3600)
    dataset = numbers(4).map(lambda row: row)
    dataset.context.enable_progress_bars = False
    ray_internals.pace_execution(dataset.context)
    assert sorted(row["id"] for row in dataset.iter_rows()) == [0, 1, 2, 3]


@ray_test
def test_what_a_shard_waited_for_is_known_by_rays_own_stages(ray_cluster: Any) -> None:
    """The names are those of its gauges, and the seconds are those of its own summary."""
    from ray.data import range as numbers
    from ray.data._internal import stats

    def slow(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.5)
        return batch

    (shard,) = numbers(4, override_num_blocks=4).map_batches(slow).streaming_split(1)
    before = ray_internals.blocked_seconds(shard)
    stages = "production_wait data_transfer batching format collate finalize"
    assert before == dict.fromkeys(stages.split(), 0.0)
    assert len(list(shard.iter_batches(batch_size=1))) == 4
    after = ray_internals.blocked_seconds(shard)
    assert after["production_wait"] >= 0.4
    gauges = inspect.getsource(stats)
    assert all(f'"data_iter_blocked_{stage}_seconds"' in gauges for stage in after)
    assert f"production wait: {stats.fmt(after['production_wait'])}" in shard.stats()


@ray_test
def test_ray_data_says_nothing(ray_cluster: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from ray.data import range as numbers

    ray_internals.quiet_data()
    dataset = numbers(4)
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    assert dataset.materialize().count() == 4
    assert capfd.readouterr() == ("", "")


@ray_test
def test_a_task_knows_its_attempt(ray_cluster: Any) -> None:
    ray = ray_cluster

    @ray.remote(max_retries=5)
    def third() -> int:
        if ray_internals.attempt_number() < 2:
            os._exit(1)
        return ray_internals.attempt_number()

    assert ray.get(third.remote()) == 2


@ray_test
def test_values_are_stored_across_processes(ray_cluster: Any) -> None:
    ray = ray_cluster

    @ray.remote
    def look() -> bytes | None:
        return ray_internals.get_value("a", namespace="test")

    ray_internals.put_value("a", "first", namespace="test")
    ray_internals.put_value("a", b"second", namespace="test")
    assert ray.get(look.remote()) == b"second"
    assert ray_internals.get_value("a", namespace="elsewhere") is None
    ray_internals.delete_value("a", namespace="test")
    ray_internals.delete_value("a", namespace="test")
    assert ray_internals.get_value("a", namespace="test") is None


@ray_test
def test_a_cluster_of_this_machine_has_no_node_types(ray_cluster: Any) -> None:
    assert not ray_internals.has_node_types()
    assert ray_internals.most_resources() == {}


def test_rays_token_has_a_logger_of_its_own() -> None:
    from ray._private.authentication import authentication_token_setup

    assert ray_internals.token_logger() is authentication_token_setup.logger


@ray_test
def test_processes_start_ahead_of_time(ray_cluster: Any) -> None:
    """That the next actor gets them is tested beside `spares`."""
    ray = ray_cluster
    (node,) = ray.nodes()
    own = ray.get_runtime_context().get_runtime_env_string()
    assert ray_internals.start_processes(node, own, 1, keep_seconds=1) is None
    why_not = ray_internals.start_processes(node | {"NodeManagerPort": 1}, own, 1, keep_seconds=1)
    assert why_not is not None
    assert "127.0.0.1:1" in why_not or "connect" in why_not


@ray_test
def test_resources_are_counted_again(ray_cluster: Any) -> None:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    ray_internals.count_resources_again(wait=True)
    ray_internals.count_resources_again(wait=False)
    del coordinator


@pytest.fixture
def known_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of `ray start` in a place of its own."""
    from ray._private import utils

    monkeypatch.setattr(utils, "get_ray_address_file", lambda temp_dir: str(tmp_path / "ray_current_cluster"))


def test_an_address_is_noted(known_addresses: None) -> None:
    assert ray_internals.known_address() is None
    ray_internals.note_address("10.0.0.1:6379")
    assert ray_internals.known_address() == "10.0.0.1:6379"


@ray_test
@pytest.mark.slow
def test_nodes_of_a_local_cluster_are_seen_and_drained(ray_cluster: Any) -> None:
    """The session's own cluster stands beside: what asks for an address gets that one's answer."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        assert ray_internals.nodes_of(cluster) == {cluster.head_node.node_id, node.node_id}
        assert not ray_internals.draining_nodes_of(cluster)
        assert not ray_internals.actors_of(cluster, "Worker")
        here = ray_internals.living_nodes_at(cluster.gcs_address, node.node_ip_address)
        assert sorted(here) == sorted(ray_internals.nodes_of(cluster))
        assert not ray_internals.living_nodes_at(cluster.gcs_address, "203.0.113.1")
        drain = {"deadline": time.time() + 600, "reason": "test"}
        assert ray_internals.drain_node(cluster.gcs_address, node.node_id, **drain) is None
        give_up = time.monotonic() + 60
        while node.node_id in ray_internals.nodes_of(cluster) and time.monotonic() < give_up:
            time.sleep(0.2)
        # It did nothing, so it went at once.
        assert ray_internals.nodes_of(cluster) == {cluster.head_node.node_id}
    finally:
        cluster.shutdown()
    ray_internals.put_value("a", "the session's cluster still answers", namespace="test")
    ray_internals.delete_value("a", namespace="test")


@ray_test
def test_actors_and_drains_of_the_cluster_that_is_connected(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node of the session's cluster cannot be drained, so what its drain is answered with is put in its place."""
    import ray
    from ray._private.state import state

    class Idle:
        def pid(self) -> int:
            return os.getpid()

    actor = ray.remote(num_cpus=0)(Idle).remote()
    pid = ray.get(actor.pid.remote())
    cluster = type("Connected", (), {"global_state": state})()
    (node,) = ray.nodes()
    assert ray_internals.actors_of(cluster, "Idle") == [(node["NodeID"], pid)]
    assert ray_internals.draining_nodes() == ray_internals.draining_nodes_of(cluster) == {}
    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"a": 0, "b": 1500})
    assert ray_internals.draining_nodes() == {"a": math.inf, "b": 1.5}
    assert ray_internals.draining_nodes_of(cluster) == {"a": 0, "b": 1500}
    ray.kill(actor)
