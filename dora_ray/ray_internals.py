"""Private and developer interfaces of Ray; no other file of the package uses any.

Ray may change these in any release, hence the pinned minor version; tests/test_ray_internals.py has a contract test for
each. Every docstring gives the purpose and the public fallback. Ray is imported inside the functions, so that a decode
process pays only for what it uses.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster
    from ray.data import DataContext, DataIterator
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ReservedResources
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.train.v2._internal.constants import DEFAULT_PREEMPTION_DEADLINE_S
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
    from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
    from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

__all__ = [
    "DEFAULT_PREEMPTION_DEADLINE_S",
    "ControllerCallback",
    "ElasticScalingPolicy",
    "ExecutionCallback",
    "NoopDecision",
    "ReservedResources",
    "ResizeDecision",
    "ScalingDecision",
    "WorkerGroupCallback",
    "WorkerGroupPollStatus",
    "WorkerGroupState",
]

# Environment variable with the setup function of a worker process. The public option
# (runtime_env={"worker_process_setup_hook": ...}) applies to a whole job; the variable to the training workers alone.
SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
# Node provider whose nodes are raylets on this machine, for cluster files. Public fallback: a real cloud.
FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
ANSWER_SECONDS = 5.0
PACE_SECONDS = 0.005

# Ray's classes and constants, by module. Public fallback of those of Ray Train: `ray.train.UserCallback`, which is told
# of failures and reports but not of resizes, drains and aborts, so that each of these would lose the steps since the
# last checkpoint. Public fallback of ExecutionCallback: stop iterating over the dataset.
_RAYS_OWN = {
    "ReservedResources": "ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator",
    "ExecutionCallback": "ray.data._internal.execution.execution_callback",
    "DEFAULT_PREEMPTION_DEADLINE_S": "ray.train.v2._internal.constants",
    "ControllerCallback": "ray.train.v2._internal.execution.callback",
    "WorkerGroupCallback": "ray.train.v2._internal.execution.callback",
    "NoopDecision": "ray.train.v2._internal.execution.scaling_policy",
    "ResizeDecision": "ray.train.v2._internal.execution.scaling_policy",
    "ScalingDecision": "ray.train.v2._internal.execution.scaling_policy",
    "ElasticScalingPolicy": "ray.train.v2._internal.execution.scaling_policy.elastic",
    "WorkerGroupPollStatus": "ray.train.v2._internal.execution.worker_group",
    "WorkerGroupState": "ray.train.v2._internal.execution.worker_group",
}


def __getattr__(name: str) -> Any:
    """Import one of Ray's names on first use."""
    if name not in _RAYS_OWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_RAYS_OWN[name]), name)


# Ray Train


def hide_preemption(status: WorkerGroupPollStatus) -> None:
    """Remove the drain information from a health check before Ray Train's controller sees it.

    Public fallback: none; the controller then waits for the deadline of the drain without training.
    """
    for worker in status.worker_statuses.values():
        worker.preemption_info = None


# Ray Data


def call_each_turn(context: DataContext, call: Callable[[], object]) -> None:
    """Run `call` in each iteration of a dataset's scheduling loop; an exception from it ends the execution.

    Public fallback: none; an execution that waits for nodes which never come cannot be ended from outside.

    Args:
        context: the dataset's context, before iteration.
        call: function to run; pickled with the context if the loop runs in its own actor (`streaming_split`).
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class EachTurn(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            call()

    context.custom_execution_callback_classes.append(EachTurn)


def pace_execution(context: DataContext) -> None:
    """Make the scheduling loop sleep 5 ms per iteration, and start as soon as the cluster's resources are known.

    If the consumer is slower than the tasks, the loop would busy-wait on a core. It also polls the resources only once
    a second, the first time before any are known, so nothing would start in the first second.

    Public fallback: leave it out, at the cost of that core and that second.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pace(ExecutionCallback):
        def before_execution_starts(self, executor: Any) -> None:
            self._began = time.monotonic()

        def on_execution_step(self, executor: Any) -> None:
            time.sleep(PACE_SECONDS)
            manager = executor._resource_manager
            if manager._global_limits.cpu == 0 and time.monotonic() - self._began < 1.0:
                manager._global_limits_last_update_time = 0.0

    context.custom_execution_callback_classes.append(Pace)


def blocked_seconds(shard: DataIterator) -> dict[str, float]:
    """Seconds in which this process waited for a shard of `streaming_split`, by the stage that kept it waiting.

    They are the gauges `ray_data_iter_blocked_<stage>_seconds` of Ray's dashboard before these are sent.
    Public fallback: `shard.stats()`, a text for people that takes a call to the actor that deals the blocks out.
    """
    from ray.data._internal.stats import IterationStage

    stats: Any = shard._iter_stats  # type: ignore[attr-defined]
    return {stage.value: float(stats.get_blocked_timer(stage).get()) for stage in IterationStage}


def quiet_data() -> None:
    """Silence Ray Data's note that its progress bars are off, and its final line.

    Public fallback: leave it out; the lines appear between ours.
    """
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)


# Tasks, and values that outlive their processes


def attempt_number() -> int:
    """Return the number of earlier attempts of the current task; 0 in the first one.

    Public fallback: none for tasks; record the start of each attempt with `put_value`, at the cost of a call to the
    head for every task.
    """
    from ray._private.worker import global_worker

    return int(global_worker.core_worker.get_current_task_attempt_number())


def put_value(key: str, value: str | bytes, *, namespace: str) -> None:
    """Store a small value on the head node, where it outlives every worker; replace an existing one.

    Public fallback of these three: a detached actor with a dict, which costs another process.
    """
    _values().internal_kv_put(
        key.encode(), value.encode() if isinstance(value, str) else value, True, namespace.encode()
    )


def get_value(key: str, *, namespace: str) -> bytes | None:
    """Return a value stored by `put_value`; None if there is none."""
    value: bytes | None = _values().internal_kv_get(key.encode(), namespace.encode())
    return value


def delete_value(key: str, *, namespace: str) -> None:
    """Delete a value stored by `put_value`, if it exists."""
    _values().internal_kv_del(key.encode(), False, namespace.encode())


def _values() -> Any:
    """Return the client of the head of the cluster that this process is connected to.

    `ray.experimental.internal_kv` offers the same, but loses it when a local Cluster in this process ends.
    """
    from ray._private.worker import global_worker

    return global_worker.gcs_client


# Nodes


def draining_nodes() -> dict[str, float]:
    """Return draining nodes: id -> deadline as time.time(), inf without a deadline.

    Public fallback: `ray.train.get_preemption_info()` in the workers, which is a barrier and reports seconds later.
    """
    import ray

    milliseconds = ray._private.state.state.get_draining_nodes()
    return {node: end / 1000 if end else math.inf for node, end in milliseconds.items()}


def drain_node(address: str, node_id: str, *, deadline: float, reason: str) -> str | None:
    """Ask Ray to drain a node for a preemption.

    Public fallback: the command `ray drain-node`, in a process that takes a second to start.

    Args:
        address: host:port of the cluster's control plane.
        node_id: the node's id, in hexadecimal.
        deadline: time.time() at which the node goes away.
        reason: reason for Ray's own messages.

    Returns:
        None if Ray accepts; its reason if it refuses.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    client = GcsClient(address=address)
    accepted, refusal = client.drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, reason, int(deadline * 1000))
    return None if accepted else str(refusal)


def living_nodes_at(address: str, ip: str) -> list[str]:
    """Return the ids of live nodes at an IP address.

    Public fallback: `ray.nodes()`, for which this process would have to connect as a driver.

    Args:
        address: host:port of the cluster's control plane.
        ip: IP address of the machine.
    """
    from ray._raylet import GcsClient
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    nodes = GcsClient(address=address).get_all_node_info().items()
    return [key.hex() for key, node in nodes if node.node_manager_address == ip and node.state == GcsNodeInfo.ALIVE]


def has_node_types() -> bool:
    """Return whether the cluster has an autoscaler with node types; without one, a node's type is named after its id.

    Public fallback: assume that every cluster can grow, and wait for nodes that may never come.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    nodes = [*status.active_nodes, *status.idle_nodes]
    return any(node.ray_node_type_name != f"node_{node.node_id}" for node in nodes)


def most_resources() -> dict[str, float]:
    """Return the resources with all nodes that the autoscaler's node types allow; empty without an autoscaler.

    Public fallback: `ray.cluster_resources()`, the resources of the present nodes.
    """
    import ray

    most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: float(count) for name, count in most.items()}


def token_logger() -> logging.Logger:
    """Return the logger that reports at every start that Ray uses a token.

    Public fallback: leave the line in.
    """
    return logging.getLogger("ray._private.authentication.authentication_token_setup")


def start_processes(node: Mapping[str, Any], runtime_environment: str, count: int, *, keep_seconds: int) -> str | None:
    """Start worker processes on a node ahead of time, for the next actors with this environment.

    Public fallback: leave it out; those actors then take as long to start as the first ones.

    Args:
        node: the node's entry in `ray.nodes()`.
        runtime_environment: `ray.get_runtime_context().get_runtime_env_string()` of such a worker.
        count: number of processes.
        keep_seconds: time before an idle process may be stopped.

    Returns:
        None on success; else the reason.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import Language
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    request = PrestartWorkersRequest(
        language=Language.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        keep_alive_duration_secs=keep_seconds,
        num_workers=count,
    )
    request.runtime_env_info.serialized_runtime_env = runtime_environment
    try:
        with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        return str(error)
    return None


def count_resources_again(*, wait: bool) -> None:
    """Refresh the resources that a training may reserve now, rather than at the coordinator's next tick.

    Public fallback: leave it out and wait for the tick, which comes every 20 seconds.

    Args:
        wait: wait until it is done.

    Raises:
        RayError: no answer. ValueError: nothing is reserved on this cluster.
    """
    import ray

    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    counted = coordinator.get_reserved_resources.remote("", recompute=True)
    if wait:
        ray.get(counted, timeout=ANSWER_SECONDS)


# Clusters on this machine, for `dora-ray chaos`


def known_address() -> str | None:
    """Return the cluster address that `ray start` recorded on this machine, for connections with address="auto".

    Public fallback of these two: none; after a local cluster ends, the other one is found only by its address.
    """
    from ray._private.utils import read_ray_address

    address: str | None = read_ray_address()
    return address


def note_address(address: str) -> None:
    """Record a cluster's address as `ray start` does."""
    from ray._private.utils import write_ray_address

    write_ray_address(address)


def nodes_of(cluster: Cluster) -> set[str]:
    """Return the ids of a local cluster's live nodes.

    Public fallback of these three: `ray.nodes()` and `ray.util.state`, in a process that is connected to the cluster.
    """
    return set(cluster.global_state._live_node_ids())


def draining_nodes_of(cluster: Cluster) -> dict[str, int]:
    """Return a local cluster's draining nodes: id -> deadline in milliseconds since the epoch."""
    return dict(cluster.global_state.get_draining_nodes())


def actors_of(cluster: Cluster, class_suffix: str) -> list[tuple[str, int]]:
    """Return (node id, process id) of a local cluster's live actors whose class name ends with `class_suffix`."""
    actors = cluster.global_state.actor_table(None, None, "ALIVE").values()
    return [
        (actor["Address"]["NodeID"], actor["Pid"]) for actor in actors if actor["ActorClassName"].endswith(class_suffix)
    ]
