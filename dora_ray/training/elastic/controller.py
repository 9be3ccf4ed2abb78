"""Extensions of Ray Train's controller: no resize, drain or abort loses a step, and restarts are quick.

Ray Train stops a worker group before it starts the next one, without warning the workers. The scaling policy below
delays a resize until the workers have saved (see `departure`). It does not count drained nodes, so that a group moves
off them as soon as the notice arrives.

The callback below also runs in the controller's process. Before an abort it asks the workers to save. On a preemption
notice it asks them to save at once, and again before the deadline. After a failure it waits until rank 0, if alive, has
saved and the cluster knows that the node is lost; then it refreshes the resource reservations, which Ray itself does
only every 20 seconds. `ray_internals` lists the Ray internals used here.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from signal import SIGTERM
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from dora_ray.ray_internals import (
    DEFAULT_PREEMPTION_DEADLINE_S,
    ControllerCallback,
    ElasticScalingPolicy,
    NoopDecision,
    ReservedResources,
    ScalingDecision,
    WorkerGroupCallback,
    WorkerGroupPollStatus,
    WorkerGroupState,
    count_resources_again,
    draining_nodes,
    hide_preemption,
)
from dora_ray.training.elastic.departure import Departure, departure_of, note
from dora_ray.training.elastic.requests import LEAVE_SECONDS, Request, ask, catch_signals, wait_for_end
from dora_ray.training.elastic.spares import environment, start_spares

logger = logging.getLogger(__name__)

# Spares start once the workers are running and, the first time, their decode tasks too. A resize onto a new node waits,
# while training continues, until its spare is ready: as long as the first workers took to start, and at most
# SPARE_READY_SECONDS.
SPARES_AFTER_SECONDS, SPARES_AFTER_RESTART_SECONDS = 15.0, 5.0
SPARE_READY_SECONDS = 15.0
# Actors that Ray starts with each worker group on the controller's node: placement cleanup, report synchronization,
# preemption watcher, shard server, row splitter.
GROUP_ACTORS = 5
LOST_NODE_SECONDS = 15.0
# After a peer is lost, rank 0's next all-reduce fails, at once if the connection was closed. Then rank 0 saves.
NOTICE_PEER_SECONDS, SAVE_SECONDS = 2.0, 60.0
# Timeout of a short call to a worker.
ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.1


class StayingNodes(ElasticScalingPolicy):
    """Scaling policy: as many workers as fit on nodes that are not drained; leave a drained node at once.

    Ray Train's own policy also counts drained nodes, and lost ones for a while. Ray places nothing on either, so
    starting a group times out. On a preemption notice, Ray Train waits for the deadline without training; this policy
    leaves it to do so only if too few workers would remain.

    Args:
        scaling_config: the trainer's.
        departure: departure of the run's workers, who save and leave before a resize.
        patience: seconds that workers get to finish their step (perhaps an evaluation) and save.
    """

    def __init__(self, scaling_config: ScalingConfig, departure: Departure, patience: float) -> None:
        super().__init__(scaling_config)
        self._departure, self._patience = departure, patience

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Decide at every health check; a resize only once the workers have left."""
        departure = self._departure
        if not departure.under_way:
            wanted = self._wanted(worker_group_state, worker_group_status)
            if isinstance(wanted, NoopDecision):
                return wanted
            departure.begin(worker_group_state.workers, "resize", patience=self._patience)
        # The nodes may have changed by now. Workers that are not stopped continue after a while.
        reserved = self._get_reserved_resources() if departure.over() else None
        if reserved is None:
            return NoopDecision()
        departure.end()
        count = self._count_possible_workers(reserved)
        return self._get_resize_decision(count) if count >= self.scaling_config.min_workers else NoopDecision()

    def _wanted(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Return Ray Train's own decision unless a worker's node is drained."""
        if not {worker.metadata.node_id for worker in worker_group_state.workers} & draining_nodes().keys():
            return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        count = self._count_possible_workers(self._get_reserved_resources() or {})
        enough = count >= self.scaling_config.min_workers
        return self._get_resize_decision(count) if enough else NoopDecision()

    def _count_possible_workers(self, reserved_resources: ReservedResources) -> int:
        # Reservations are refreshed only every 20 seconds, so a node may be gone by now.
        staying = _alive() - draining_nodes().keys()
        count: int = super()._count_possible_workers(
            {node: resources for node, resources in reserved_resources.items() if node in staying}
        )
        return count


class ElasticTrainer(TorchTrainer):  # type: ignore[misc]  # untyped, see pyproject.toml
    """TorchTrainer that scales by `StayingNodes` if its number of workers is a range."""

    def _initialize_and_run_controller(self, *, scaling_policy: Any, callbacks: list[Any], **rest: Any) -> Any:
        if isinstance(scaling_policy, ElasticScalingPolicy):
            (elastic,) = (callback for callback in callbacks if isinstance(callback, Elastic))
            scaling_policy = StayingNodes(self.scaling_config, elastic.departure, elastic.patience)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, callbacks=callbacks, **rest)


class Elastic(ControllerCallback, WorkerGroupCallback):
    """Ray Train callback of one run.

    Args:
        run: the run's folder; failures and restarts are added to its events.
        fast: also shorten restarts; otherwise only prevent lost steps.
        patience: seconds that workers get to finish their step (perhaps an evaluation) and save.
        spares: if fast, keep a spare process per worker (see `spares`): worth its memory if workers come and go.
    """

    def __init__(self, run: str, *, fast: bool, spares: bool, patience: float) -> None:
        self._run, self._fast, self._spares, self.patience = run, fast, fast and spares, patience
        self.departure = departure_of(run)
        self._group: Any = None
        self._noticed: float | None = None
        self._told: set[int] = set()
        self._nodes: frozenset[str] = frozenset()
        self._asked_at, self._start_seconds = -math.inf, SPARE_READY_SECONDS
        self._environment = self._own_environment = ""
        self._spares_at = math.inf

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Record the time at which the placement is requested."""
        self._asked_at, self._own_environment = time.monotonic(), environment()
        note(self._run, "group", world_size=worker_group_context.num_workers)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Install signal handlers before training starts: an actor's call still runs in its main thread."""
        for worker in worker_group.get_workers():
            worker.execute_async(catch_signals, SIGTERM)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """Track the new group, and schedule its spares."""
        self._group, self._noticed, self._told = worker_group, None, set()
        self.departure.cancel()  # if the previous group failed while leaving
        if self._spares:
            wait = SPARES_AFTER_RESTART_SECONDS
            if not self._environment:  # first start of the run
                wait = SPARES_AFTER_SECONDS
                self._start_seconds = min(SPARE_READY_SECONDS, time.monotonic() - self._asked_at)
                with suppress(RayError):  # the next health check reports a worker that is already dead
                    asked = worker_group.get_workers()[0].execute_async(environment)
                    self._environment = ray.get(asked, timeout=ANSWER_SECONDS)
            self._spares_at = time.monotonic() + wait if self._environment else math.inf

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Forget the group."""
        self._group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Record failures, announce preemptions and look for new nodes at every health check."""
        # A lost worker causes errors in others; together they are one failure.
        failed = {rank: error for rank, error in worker_group_status.errors.items() if rank not in self._told}
        if failed:
            self._told.update(failed)
            note(self._run, "failure", ranks=sorted(failed), error=describe(most_telling(failed.values())))
        if self._group is not None:
            self._announce_drains(self._group.get_workers())
        if self.departure.under_way:
            # If it saw the drain, Ray Train would wait for its deadline instead of asking the scaling policy.
            hide_preemption(worker_group_status)
        if self._fast:
            self._look_after_nodes()

    def _announce_drains(self, workers: Sequence[Any]) -> None:
        """Notify all workers when one of their nodes is being drained.

        Ray Train's own watcher is an actor that restarts with every group: it reports seconds later, and nothing at all
        in the first seconds after a restart.
        """
        draining = draining_nodes()
        leaving = {rank: worker.metadata.node_id for rank, worker in enumerate(workers)}
        ends = {rank: draining[node] for rank, node in leaving.items() if node in draining}
        first = min(ends.values(), default=None)
        if first is None or first == self._noticed:
            return
        self._noticed = first
        self.departure.not_before = -math.inf  # no time to wait for spares
        # Without a deadline, Ray Train restarts after its own default.
        deadline = first if math.isfinite(first) else time.time() + DEFAULT_PREEMPTION_DEADLINE_S
        note(self._run, "notice", ranks=sorted(ends), deadline=deadline)
        for worker in workers:
            worker.execute_async(ask, Request.NOTICE, "preemption", deadline)

    def _look_after_nodes(self) -> None:
        """Start spares for the workers of this group, and for those that a new node will get."""
        now, alive = time.monotonic(), {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        new = set(alive) - self._nodes if self._nodes else set()
        self._nodes = frozenset(alive)
        if self._group is not None and now >= self._spares_at:
            self._spares_at = math.inf
            places = Counter(worker.metadata.node_id for worker in self._group.get_workers())
            for node, count in places.items():
                if node in alive:
                    start_spares(alive[node], self._environment, count)
            start_spares(alive[ray.get_runtime_context().get_node_id()], self._own_environment, GROUP_ACTORS)
        if new and self._environment:
            for node in new:
                start_spares(alive[node], self._environment, 1)
            self.departure.not_before = now + self._start_seconds
        if new:
            _count_again(wait=False)

    def before_controller_abort(self) -> None:
        """Let the workers save on Ctrl-C in the launching process; they get less time, because the user is waiting."""
        if self._group is None:
            return
        self.departure.begin(self._group.get_workers(), "abort", patience=LEAVE_SECONDS)
        while not self.departure.over():
            time.sleep(LOOK_SECONDS)
        self.departure.end()
        self._group = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Wait until rank 0 has saved and Ray has removed lost nodes: a group placed on a lost node fails again."""
        group, self._group = self._group, None
        if group is not None:
            asked = group.get_workers()[0].execute_async(wait_for_end, NOTICE_PEER_SECONDS, SAVE_SECONDS)
            ray.wait([asked], timeout=NOTICE_PEER_SECONDS + SAVE_SECONDS)
        if not self._fast:
            return
        started = time.monotonic()
        lost = _unreachable([node for node in ray.nodes() if node["Alive"]])
        while lost & _alive() and time.monotonic() - started < LOST_NODE_SECONDS:
            time.sleep(0.1)
        _count_again(wait=True)
        note(self._run, "hold", seconds=round(time.monotonic() - started, 2), nodes=len(lost))


def most_telling(errors: Iterable[BaseException]) -> BaseException:
    """Return the root cause of a failure rather than the connection errors that it triggers in other ranks."""
    return min(errors, key=lambda error: "actor" not in str(error).lower())


def describe(error: BaseException) -> str:
    """Return the last line of an error (in Ray's errors it holds the worker's own), with a remedy if out of memory."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = lines[-1].strip() if lines else type(error).__name__
    cause = getattr(error, "health_check_failure", error)
    if isinstance(cause, OutOfMemoryError) or "out of memory" in str(cause).lower():
        text += " (out of memory: lower optim.clips_per_slot, the slot's size, or use nodes with more memory)"
    return text


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _unreachable(nodes: Sequence[dict[str, Any]]) -> set[str]:
    """Return the nodes whose raylet does not answer: dead, before Ray's health check has noticed."""
    found = set()
    for node in nodes:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=0.5).close()
        except OSError:
            found.add(node["NodeID"])
    return found


def _count_again(*, wait: bool) -> None:
    """Refresh the cluster's resource reservations now rather than at the coordinator's next tick."""
    try:
        count_resources_again(wait=wait)
    except (RayError, ValueError) as error:
        logger.warning("resource reservations are refreshed only at the coordinator's next tick: %s", error)
