"""The clip stream of one rank: its slots in the plan's order, from threads of this process or from a Ray cluster.

There is no iterator state anywhere: a stream is told which steps are left, and begins there.

Plain Ray tasks, and not Ray Data, which reads no quicker (`dora-ray bench stream` runs both): a rank's stream is
ordered and endless, begins anew at every restart and resize, reads unreadable clips again elsewhere and lets many tasks
share a decoded segment; Ray Data starts its executor for each window of rows, and its first slot comes a second later.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from dora_ray.clips.pipeline import slots_in_order
from dora_ray.clips.plan import Plan
from dora_ray.clips.slot import SlotBatch, SlotKey, read_slot

__all__ = ["SlotBatch", "SlotKey", "local_slots", "ray_slots", "read_slot"]


def local_slots(
    plan: Plan, keys: Iterator[SlotKey], *, prefetch: int, num_threads: int, decode_seconds: float
) -> Iterator[SlotBatch]:
    """The slots of `keys`, in order, read by threads of this process.

    Args:
        plan: the plan.
        keys: steps and slots, ascending in the steps.
        prefetch: slots read ahead.
        num_threads: threads that read slots, and as many that decode segments.
        decode_seconds: the longest that a clip or a frame may take before it is given up.
    """
    from dora_ray.clips.local_engine import LocalEngine

    engine = LocalEngine(plan, num_threads=num_threads, decode_seconds=decode_seconds)
    yield from slots_in_order(plan, keys, engine, slots_per_task=1, prefetch=prefetch)


def ray_slots(
    plan: Plan,
    steps: range,
    slots: Sequence[int],
    *,
    prefetch: int,
    slots_per_task: int,
    cpus_per_task: float,
    num_streams: int,
    node_label: str | None,
    decode_seconds: float,
) -> Iterator[SlotBatch]:
    """The given slots of the given steps, in order, read by Ray tasks.

    Args:
        plan: the plan.
        steps: steps still to be computed.
        slots: this rank's slots of each step.
        prefetch: slots held ready in this process.
        slots_per_task: slots that one task reads.
        cpus_per_task: CPUs that Ray reserves for a task.
        num_streams: streams that run beside each other, one a rank: each takes its share of CPUs and memory.
        node_label: value of the node label `role` that tasks are pinned to; None: any node.
        decode_seconds: the longest that a clip or a frame may take before its process is ended.
    """
    from dora_ray.clips.ray_engine import RayEngine

    engine = RayEngine(
        plan,
        slots_per_task=slots_per_task,
        cpus_per_task=cpus_per_task,
        num_streams=num_streams,
        node_label=node_label,
        decode_seconds=decode_seconds,
    )
    keys = ((step, slot) for step in steps for slot in slots)
    ahead = _Ahead(
        lambda: slots_in_order(plan, keys, engine, slots_per_task=slots_per_task, prefetch=prefetch), prefetch
    )
    try:
        yield from ahead
    finally:
        ahead.close()


class _Ahead:
    """An iterator run by a thread of its own that keeps a few items ready, so that they are here when asked for."""

    _END = object()

    def __init__(self, open_items: Callable[[], Iterator[Any]], count: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, count))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(open_items,), name="clip-stream", daemon=True)
        self._thread.start()

    def _fill(self, open_items: Callable[[], Iterator[Any]]) -> None:
        try:
            for item in open_items():
                if not self._put(item):
                    return
            self._put(self._END)
        except BaseException as error:  # noqa: BLE001  it is raised again by the thread that iterates
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return True
        return False

    def __iter__(self) -> Iterator[Any]:
        while (item := self._queue.get()) is not self._END:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the iterator."""
        self._closed.set()
        self._thread.join(timeout=5)
