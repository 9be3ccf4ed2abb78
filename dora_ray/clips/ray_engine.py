"""Slots read and segments decoded by tasks on a Ray cluster.

Tasks and their objects live in Ray's object store: a segment is a task's result that the tasks of a slot share without
copying, near which Ray places them, and which Ray makes anew when its node is lost.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from dora_ray.clips.direct import DecodedSegment, decode_segment
from dora_ray.clips.plan import Plan
from dora_ray.clips.slot import SlotBatch, SlotKey, read_slots
from dora_ray.ray_internals import SETUP_HOOK
from dora_ray.store.supervision import TaskWatch

logger = logging.getLogger(__name__)

# Watches end processes on purpose, and each ending counts as a retry; a task that dies more often is broken.
MAX_RETRIES = 20
LOOK_SECONDS = 10.0
WAIT_SECONDS = 1.0
# Of the object store, for ready slots; decoded segments need the rest.
READY_SHARE = 0.3

# Of a task: its object reference, once it is begun.
Handle = Future[Any]


class RayEngine:
    """See `pipeline.Engine`."""

    def __init__(
        self,
        plan: Plan,
        *,
        slots_per_task: int,
        cpus_per_task: float,
        num_streams: int,
        node_label: str | None,
        decode_seconds: float,
    ) -> None:
        """Give the cluster the plan.

        Args:
            plan: the plan.
            slots_per_task: slots that a reading task gives.
            cpus_per_task: CPUs that Ray reserves for a task.
            num_streams: streams beside each other, which share the cluster's CPUs and memory.
            node_label: value of the node label `role` that tasks are pinned to; None: any node.
            decode_seconds: the longest that a clip or a frame may take before its process is ended.
        """
        import ray

        # Inside a tuple, so that tasks get the reference itself and every process unpacks the plan once.
        self._plan = (ray.put(plan),)
        self._seconds = decode_seconds
        self._label = node_label
        self._cpus, self._streams = cpus_per_task, num_streams
        self._bytes = num_streams * slots_per_task * plan.clips_per_slot * plan.num_frames * plan.clip_size**2 * 3
        self._looked_at = -math.inf
        # Of this stream: tasks that CPUs are there for, and tasks whose slots the object store has room for.
        self._room, self._most_ready = 1.0, 1.0
        self._has_room = node_label is not None or _has_room(cpus_per_task)
        self._lane = _Lane(self._can_run)
        # "DEFAULT" and not the training worker's own placement group.
        options: dict[str, Any] = {
            "num_cpus": cpus_per_task if self._has_room else 0.0,
            "max_retries": MAX_RETRIES,
            "scheduling_strategy": "DEFAULT",
        }
        if os.environ.get(SETUP_HOOK):
            # A task's process inherits what a training worker's process imports before it begins: seconds of work.
            options["runtime_env"] = {"env_vars": {SETUP_HOOK: ""}}
        pinned: dict[str, Any] = {"label_selector": {"role": node_label}} if node_label else {}
        anywhere, elsewhere = options | pinned, options | (pinned or {"scheduling_strategy": "SPREAD"})
        # By whether the work is done again.
        self._decode = [ray.remote(**how)(_decode_task) for how in (anywhere, elsewhere)]
        self._read = [ray.remote(**how)(_read_task) for how in (anywhere, elsewhere)]

    def decode(self, segment: int, *, again: bool = False) -> Handle:
        """See `pipeline.Engine`."""
        return self._lane.put(lambda: self._decode[again].remote(self._plan, segment, self._seconds))

    def read(self, keys: Sequence[SlotKey], segments: Mapping[int, Handle], *, again: bool = False) -> Handle:
        """See `pipeline.Engine`."""
        task, numbers, handles = self._read[again], tuple(segments), tuple(segments.values())

        def begin() -> Any:
            # They were begun before.
            decoded = [handle.result() for handle in handles]
            return task.remote(self._plan, tuple(keys), self._seconds, numbers, *decoded)

        return self._lane.put(begin)

    def result(self, handle: Handle) -> list[SlotBatch]:
        """See `pipeline.Engine`."""
        import ray

        batches: list[SlotBatch] = ray.get(handle.result())
        return batches

    def unfinished(self, handles: list[Handle]) -> list[Handle]:
        """See `pipeline.Engine`."""
        running = set(_unfinished([handle.result() for handle in handles if handle.done()]))
        return [handle for handle in handles if not handle.done() or handle.result() in running]

    def capacity(self) -> int:
        """See `pipeline.Engine`."""
        self._look()
        return max(1, int(min(self._room, self._most_ready / 2)))  # twice as many tasks are in flight

    def _can_run(self) -> float:
        """Tasks that can run at a time: any number of those that ask for no CPU."""
        self._look()
        return max(1.0, self._room) if self._has_room else math.inf

    def _look(self) -> None:
        """Nodes come and go, so the cluster is asked again and again."""
        if self._has_room and time.monotonic() - self._looked_at > LOOK_SECONDS:
            nodes = _nodes(self._label)
            self._room = sum(max(0.0, free // self._cpus) for free in _free_cpus(nodes).values()) // self._streams
            memory = sum(node["Resources"].get("object_store_memory", 0.0) for node in nodes)
            self._most_ready = READY_SHARE * memory / self._bytes
            self._looked_at = time.monotonic()

    def close(self) -> None:
        """See `pipeline.Engine`: what nobody refers to any more is freed by Ray."""
        self._lane.close()


class _Lane:
    """Gives Ray only as many tasks as can run, in order: it puts a task that it runs again behind all that wait."""

    def __init__(self, most: Callable[[], float]) -> None:
        self._most = most
        self._waiting: queue.SimpleQueue[tuple[Handle, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="decode-tasks", daemon=True).start()

    def put(self, begin: Callable[[], Any]) -> Handle:
        """Have a task begun when there is room for it."""
        handle: Handle = Future()
        self._waiting.put((handle, begin))
        return handle

    def close(self) -> None:
        """Begin no more."""
        self._closed.set()
        self._waiting.put(None)

    def _run(self) -> None:
        running: list[Any] = []
        while (task := self._waiting.get()) is not None and not self._closed.is_set():
            handle, begin = task
            try:
                running = self._make_room(running)
                reference = begin()
            except BaseException as error:  # noqa: BLE001  it is raised again by the thread that waits for the result
                handle.set_exception(error)
            else:
                running.append(reference)
                handle.set_result(reference)

    def _make_room(self, running: list[Any]) -> list[Any]:
        """Wait until another task can run; returns those that do."""
        import ray

        running = _unfinished(running)
        while len(running) >= self._most():
            if self._closed.is_set():
                raise CancelledError
            running = ray.wait(running, timeout=WAIT_SECONDS, fetch_local=False)[1]
        return running


def _unfinished(references: list[Any]) -> list[Any]:
    import ray

    if not references:
        return []
    unfinished: list[Any] = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)[1]
    return unfinished


def _nodes(label: str | None) -> list[dict[str, Any]]:
    """The living nodes, those of that value of the label `role` if one is given."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and label in (None, node["Labels"].get("role"))]


def _free_cpus(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CPUs of each node beside those that placement groups, the training workers', hold there.

    Counted from the reservations, since what is free at this moment says nothing about what will be.
    """
    from ray.util import placement_group_table

    left = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in nodes}
    for group in placement_group_table().values():
        for index, node in group["bundles_to_node_id"].items() if group["state"] == "CREATED" else ():
            if node in left:
                left[node] -= group["bundles"][index].get("CPU", 0.0)
    return left


def _has_room(cpus: float) -> bool:
    """Whether a node has so many CPUs that are not reserved.

    Where the training workers have taken every CPU, a task that asks for one would wait for ever: it runs beside them.
    """
    if max(_free_cpus(_nodes(None)).values(), default=0.0) >= cpus:
        return True
    logger.warning(
        "every CPU of the cluster is reserved, so clips are read beside the training workers: lower "
        "cluster.cpus_per_worker, or add nodes that decode"
    )
    return False


@functools.lru_cache(maxsize=2)
def plan_of(reference: Any) -> Plan:
    """The plan behind a reference, unpacked once in a process."""
    import ray

    plan: Plan = ray.get(reference)
    return plan


def _decode_task(plan: tuple[Any], segment: int, seconds: float) -> DecodedSegment:
    with TaskWatch(seconds) as watch:
        return decode_segment(plan_of(*plan), segment, watch)  # type: ignore[arg-type]


def _read_task(
    plan: tuple[Any], keys: tuple[SlotKey, ...], seconds: float, numbers: tuple[int, ...], *segments: DecodedSegment
) -> list[SlotBatch]:
    with TaskWatch(seconds) as watch:
        return read_slots(plan_of(*plan), keys, dict(zip(numbers, segments, strict=True)), watch)
