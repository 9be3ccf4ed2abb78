"""What is added to Ray Train's controller, so that no resize, drain or abort loses a step and restarts are quick.

Ray Train ends a worker group before it starts the next one, and tells nobody beforehand. The callback below lives in
the controller's process. Before a resize or an abort it asks the workers to save and waits until they have; on the
notice of a preemption it asks them to save at once, and again before the deadline; after a failure it waits until rank
0, if it lives, has saved and the lost node is known to be lost, and has the reservations counted again, which Ray does
every 20 seconds only. The scaling policy below counts no drained node, so that a group moves off it when the notice
comes. `ray_internals` names what of Ray this leans on.
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
from ray.train.torch import TorchTrainer

from dora_ray.errors import DoRAError
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
)
from dora_ray.training.elastic.requests import LEAVE_SECONDS, Request, ask, ask_to_leave, catch_signals, wait_for_end
from dora_ray.training.elastic.spares import environment, start_spares
from dora_ray.training.records.journal import add_event

logger = logging.getLogger(__name__)

# Spares are started when the start of the workers, and the first time that of their decode tasks, is over; a resize
# onto a new node waits, training on, for its spare: for as long as the first workers took to start, and no longer than
# SPARE_READY_SECONDS.
SPARES_AFTER_SECONDS, SPARES_AFTER_RESTART_SECONDS = 15.0, 5.0
SPARE_READY_SECONDS = 15.0
LOST_NODE_SECONDS = 15.0
# After another rank's end rank 0's next sum fails, at once where the connection was closed; then it saves.
NOTICE_PEER_SECONDS, SAVE_SECONDS = 2.0, 60.0
# What a worker that is asked for a word answers in.
ANSWER_SECONDS = 5.0


class StayingNodes(ElasticScalingPolicy):
    """As many workers as fit on the nodes that stay, and off those that are drained as soon as that is known.

    Ray Train's own policy counts drained nodes too, and lost ones for a while, on which Ray places nothing: the start
    of a group times out. And on the notice it waits for the deadline, while nobody trains: that is left to it where too
    few workers would stay.
    """

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Every health check; Ray Train's own answer where no worker's node is drained."""
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

    def _initialize_and_run_controller(self, *, scaling_policy: Any, **rest: Any) -> Any:
        if isinstance(scaling_policy, ElasticScalingPolicy):
            scaling_policy = StayingNodes(self.scaling_config)
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **rest)


class Elastic(ControllerCallback, WorkerGroupCallback):
    """Ray Train callback of one run.

    Args:
        run: the run's folder; failures and restarts are added to its events.
        fast: do what shortens restarts; else only what saves steps.
        patience: seconds that workers are given to end their step, an evaluation perhaps, and to save.
        spares: if fast, keep a spare process for each worker, see `spares`: worth its memory where workers come and go.
    """

    def __init__(self, run: str, *, fast: bool, spares: bool, patience: float) -> None:
        self._run, self._fast, self._spares, self._patience = run, fast, fast and spares, patience
        self._group: Any = None
        self._noticed: float | None = None
        self._told: set[int] = set()
        self._nodes: frozenset[str] = frozenset()
        self._asked_at, self._start_seconds = -math.inf, SPARE_READY_SECONDS
        self._environment = ""
        self._spares_at = math.inf
        self._new_spares_at = -math.inf

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """A placement is about to be asked for."""
        self._asked_at = time.monotonic()
        self._event("group", world_size=worker_group_context.num_workers)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """The workers' processes run, the training does not yet. An actor's call runs in its main thread."""
        for worker in worker_group.get_workers():
            worker.execute_async(catch_signals, SIGTERM)

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """From now on there is something to lose."""
        self._group, self._noticed, self._told = worker_group, None, set()
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
            self._event("failure", ranks=sorted(failed), error=describe(most_telling(failed.values())))
        if self._group is not None:
            self._announce_drains(self._group.get_workers())
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
        # Without any deadline Ray Train restarts after a time of its own.
        deadline = first if math.isfinite(first) else time.time() + DEFAULT_PREEMPTION_DEADLINE_S
        self._event("notice", ranks=sorted(ends), deadline=deadline)
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
        if new and self._environment:
            for node in new:
                start_spares(alive[node], self._environment, 1)
            self._new_spares_at = now + self._start_seconds
        if new:
            _count_again(wait=False)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Also called for the first start and after a failure, when there is no group to ask."""
        if self._group is not None:
            time.sleep(max(0.0, self._new_spares_at - time.monotonic()))
        self._leave("resize")

    def before_controller_abort(self) -> None:
        """Ctrl-C in the process that launched the run."""
        self._leave("abort")

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
        self._event("hold", seconds=round(time.monotonic() - started, 2), nodes=len(lost))

    def _leave(self, reason: str) -> None:
        """Have all workers save and wait for their end."""
        if self._group is None:
            return
        started = time.monotonic()
        # Somebody waits for an abort; a resize has time, since training goes on until it may begin.
        patience = self._patience if reason == "resize" else LEAVE_SECONDS
        asked = [worker.execute_async(ask_to_leave, reason, patience) for worker in self._group.get_workers()]
        # All of them: where one is dead, another may still be saving.
        ray.wait(asked, num_returns=len(asked), timeout=patience + 5)
        try:
            left = all(ray.get(asked, timeout=0))
        except RayError as error:
            logger.warning("not all workers could be asked to save before the %s: %s", reason, error)
            left = False
        self._group = None
        self._event("leave", reason=reason, saved=left, seconds=round(time.monotonic() - started, 2))

    def _event(self, event: str, **fields: Any) -> None:
        """Ray Train ends the run where a callback of its controller raises, and a line of a log is not worth that."""
        try:
            add_event(self._run, event, **fields)
        except (OSError, DoRAError) as error:
            logger.warning("not noted: %s %s (%s)", event, fields, error)


def most_telling(errors: Iterable[BaseException]) -> BaseException:
    """Of the errors of one failure: the dead say more than those who lost their connection to them."""
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
