"""Additions to Ray Train's controller, so that no resize, drain or abort loses a step and restarts are quick.

Ray Train ends a worker group before it starts the next one, and tells nobody beforehand. The scaling policy below holds
a resize back until the workers have saved, see `departure`, and counts no drained node, so that a group moves off it
when the notice comes. The callback below, in the controller's process too, asks the workers to save before an abort; on
the notice of a preemption it asks them to save at once, and again before the deadline; after a failure it waits until
rank 0, if it lives, has saved and the lost node is known to be lost, and has the reservations counted again, which Ray
does every 20 seconds only. `ray_internals` names what of Ray this leans on.
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

# Spares are started when the start of the workers, and the first time that of their decode tasks, is over; a resize
# onto a new node waits, training on, for its spare: for as long as the first workers took to start, and no longer than
# SPARE_READY_SECONDS.
SPARES_AFTER_SECONDS, SPARES_AFTER_RESTART_SECONDS = 15.0, 5.0
SPARE_READY_SECONDS = 15.0
# What Ray makes beside the workers of each group, on the controller's node: actors that clean the placement up,
# synchronize reports, watch for preemptions, hand out the shards, and deal out the rows.
GROUP_ACTORS = 5
LOST_NODE_SECONDS = 15.0
# After another rank's end rank 0's next sum fails, at once where the connection was closed; then it saves.
NOTICE_PEER_SECONDS, SAVE_SECONDS = 2.0, 60.0
# What a worker that is asked for a word answers in.
ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.1


class StayingNodes(ElasticScalingPolicy):
    """As many workers as fit on the nodes that stay, and off those that are drained as soon as that is known.

    Ray Train's own policy counts drained nodes too, and lost ones for a while, on which Ray places nothing: the start
    of a group times out. And on the notice it waits for the deadline, while nobody trains: that is left to it where too
    few workers would stay.

    Args:
        scaling_config: the trainer's.
        departure: of the run's workers, who leave before they are resized.
        patience: seconds that they are given to end their step, an evaluation perhaps, and to save.
    """

    def __init__(self, scaling_config: ScalingConfig, departure: Departure, patience: float) -> None:
        super().__init__(scaling_config)
        self._departure, self._patience = departure, patience

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Every health check: a resize is decided when the workers have left for it."""
        departure = self._departure
        if not departure.under_way:
            wanted = self._wanted(worker_group_state, worker_group_status)
            if isinstance(wanted, NoopDecision):
                return wanted
            departure.begin(worker_group_state.workers, "resize", patience=self._patience)
        # The nodes may be others by now. Workers that nobody ends go on after a while.
        reserved = self._get_reserved_resources() if departure.over() else None
        if reserved is None:
            return NoopDecision()
        departure.end()
        count = self._count_possible_workers(reserved)
        return self._get_resize_decision(count) if count >= self.scaling_config.min_workers else NoopDecision()

    def _wanted(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Ray Train's own decision where no worker's node is drained."""
        if not {worker.metadata.node_id for worker in worker_group_state.workers} & draining_nodes().keys():
            return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        count = self._count_possible_workers(self._get_reserved_resources() or {})
        enough = count >= self.scaling_config.min_workers
        return self._get_resize_decision(count) if enough else NoopDecision()

    def _count_possible_workers(self, reserved_resources: ReservedResources) -> int:
        # What is reserved is counted every 20 seconds only: a node may be gone since.
        staying = _alive() - draining_nodes().keys()
        count: int = super()._count_possible_workers(
            {node: resources for node, resources in reserved_resources.items() if node in staying}
        )
        return count


class ElasticTrainer(TorchTrainer):  # type: ignore[misc]  # untyped, see pyproject.toml
    """A TorchTrainer that scales by `StayingNodes` where its number of workers is a range."""

    def _initialize_and_run_controller(self, *, scaling_policy: Any, callbacks: list[Any], **rest: Any) -> Any:
        if isinstance(scaling_policy, ElasticScalingPolicy):
            (elastic,) = (callback for callback in callbacks if isinstance(callback, Elastic))
            scaling_policy = StayingNodes(self.scaling_config, elastic.departure, elastic.patience)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, callbacks=callbacks, **rest)


class Elastic(ControllerCallback, WorkerGroupCallback):
    """Ray Train callback of one run.

    Args:
        run: the run's folder; failures and restarts are added to its events.
        fast: do what shortens restarts; else only what saves steps.
        patience: seconds that workers are given to end their step, an evaluation perhaps, and to save.
        spares: if fast, keep a spare process for each worker, see `spares`: worth its memory where workers come and go.
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
        """A placement is about to be asked for."""
        self._asked_at, self._own_environment = time.monotonic(), environment()
        note(self._run, "group", world_size=worker_group_context.num_workers)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers' processes run, the training does not yet. An actor's call runs in its main thread."""
        for worker in worker_group.get_workers():
            worker.execute_async(catch_signals, SIGTERM)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """From now on there is something to lose."""
        self._group, self._noticed, self._told = worker_group, None, set()
        self.departure.cancel()  # of a group that failed meanwhile
        if self._spares:
            wait = SPARES_AFTER_RESTART_SECONDS
            if not self._environment:  # the first start of all
                wait = SPARES_AFTER_SECONDS
                self._start_seconds = min(SPARE_READY_SECONDS, time.monotonic() - self._asked_at)
                with suppress(RayError):  # a worker that is dead already is found out by the next health check
                    asked = worker_group.get_workers()[0].execute_async(environment)
                    self._environment = ray.get(asked, timeout=ANSWER_SECONDS)
            self._spares_at = time.monotonic() + wait if self._environment else math.inf

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """The group is gone."""
        self._group = None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Every health check: failures to tell, a preemption to announce, new nodes to count."""
        # One worker's end makes errors in others, which are one failure together.
        failed = {rank: error for rank, error in worker_group_status.errors.items() if rank not in self._told}
        if failed:
            self._told.update(failed)
            note(self._run, "failure", ranks=sorted(failed), error=describe(most_telling(failed.values())))
        if self._group is not None:
            self._announce_drains(self._group.get_workers())
        if self.departure.under_way:
            # Told of a drain, Ray Train would wait for its deadline instead of asking its scaling policy.
            hide_preemption(worker_group_status)
        if self._fast:
            self._look_after_nodes()

    def _announce_drains(self, workers: Sequence[Any]) -> None:
        """Tell all workers when a node of one of them goes away.

        Ray Train's own watcher is an actor that is started anew with every group: it tells seconds later, and in the
        first ones after a restart nothing.
        """
        draining = draining_nodes()
        leaving = {rank: worker.metadata.node_id for rank, worker in enumerate(workers)}
        ends = {rank: draining[node] for rank, node in leaving.items() if node in draining}
        first = min(ends.values(), default=None)
        if first is None or first == self._noticed:
            return
        self._noticed = first
        self.departure.not_before = -math.inf  # there is no time for spares
        # Without any deadline Ray Train restarts after a time of its own.
        deadline = first if math.isfinite(first) else time.time() + DEFAULT_PREEMPTION_DEADLINE_S
        note(self._run, "notice", ranks=sorted(ends), deadline=deadline)
        for worker in workers:
            worker.execute_async(ask, Request.NOTICE, "preemption", deadline)

    def _look_after_nodes(self) -> None:
        """Spares for the workers of this group, and for those that a new node will have."""
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
        """Ctrl-C in the process that launched the run, where somebody waits: the workers are given less time."""
        if self._group is None:
            return
        self.departure.begin(self._group.get_workers(), "abort", patience=LEAVE_SECONDS)
        while not self.departure.over():
            time.sleep(LOOK_SECONDS)
        self.departure.end()
        self._group = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Wait for rank 0 to save, and for the nodes that are lost to be gone: a group placed on one fails again."""
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
    """The last line of an error, which in Ray's holds the worker's own; with the remedy where memory ran out."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = lines[-1].strip() if lines else type(error).__name__
    cause = getattr(error, "health_check_failure", error)
    if isinstance(cause, OutOfMemoryError) or "out of memory" in str(cause).lower():
        text += " (out of memory: lower optim.clips_per_slot, the slot's size, or use nodes with more memory)"
    return text


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _unreachable(nodes: Sequence[dict[str, Any]]) -> set[str]:
    """Nodes whose raylet does not answer: dead, though Ray's health check has not found out yet."""
    found = set()
    for node in nodes:
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=0.5).close()
        except OSError:
            found.add(node["NodeID"])
    return found


def _count_again(*, wait: bool) -> None:
    """Have the cluster's resources counted and reserved now rather than at the coordinator's next tick."""
    try:
        count_resources_again(wait=wait)
    except (RayError, ValueError) as error:
        logger.warning("the cluster's resources are counted at the next tick: %s", error)
