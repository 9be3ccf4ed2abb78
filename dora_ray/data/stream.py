"""The clip stream: plan -> decoded and cropped uint8 clips -> one batch a slot, in the order of the plan.

`read_slot` makes a slot, anywhere. `ray_slots` runs it in Ray Data tasks on the cluster's CPUs, `local_slots` in
threads of this process. Ray Data has no iterator state, so position is never asked of it: each rank builds a dataset of
the slots that it still has to compute (a window of steps at a time), and `preserve_order` hands them out in that order.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_ray.data.augment import crop_clip
from dora_ray.data.plan import Clip, Plan
from dora_ray.data.store import read_frames
from dora_ray.errors import VideoError

logger = logging.getLogger(__name__)

SlotKey = tuple[int, int]

LOOP_PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class SlotBatch:
    """The M clips of one slot.

    Attributes:
        step: step of the run.
        slot: slot of the step.
        clips: (M, T, H, W, 3) uint8; zeros where not valid.
        valid: (M,) whether the clip could be decoded.
        digest: hash of the clips' numbers, videos, frames and pixels, for the ledger; a signed 64-bit integer.
    """

    step: int
    slot: int
    clips: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    digest: int


def read_slot(plan: Plan, step: int, slot: int) -> SlotBatch:
    """Read, decode and crop the clips of one slot. A clip that cannot be read is marked, never dropped."""
    clips = plan.slot_clips(step, slot)
    boxes = plan.slot_boxes(step, slot, clips)
    shape = (len(clips), plan.num_frames, plan.clip_size, plan.clip_size, 3)
    pixels, valid = np.zeros(shape, np.uint8), np.zeros(len(clips), np.bool_)
    for i, (clip, box) in enumerate(zip(clips, boxes, strict=True)):
        video = plan.videos[clip.video]
        try:
            pixels[i] = crop_clip(read_frames(video, clip.frames), box, plan.clip_size)
            valid[i] = True
        except (VideoError, OSError) as error:
            logger.warning(
                "clip %d (%s, %.2f s) cannot be read: %s", clip.number, video.path, video.times[clip.frames[0]], error
            )
    return SlotBatch(step, slot, pixels, valid, _digest(clips, pixels))


def _digest(clips: list[Clip], pixels: NDArray[np.uint8]) -> int:
    """Hash of what was decoded: numbers, videos, frames and pixels."""
    names = np.array([[clip.number, clip.video, *clip.frames] for clip in clips], np.int64)
    state = hashlib.blake2b(names.tobytes(), digest_size=8)
    state.update(pixels.data)
    return int.from_bytes(state.digest(), "little", signed=True)


def local_slots(plan: Plan, keys: Iterator[SlotKey], *, prefetch: int, num_threads: int) -> Iterator[SlotBatch]:
    """The slots of `keys`, in order, read by threads of this process."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="slots") as pool:
        pending: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for key in islice(keys, prefetch):
            pending.put(pool.submit(read_slot, plan, *key))
        try:
            while not pending.empty():
                batch = pending.get().result()
                for key in islice(keys, 1):
                    pending.put(pool.submit(read_slot, plan, *key))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def ray_slots(
    plan: Plan,
    steps: range,
    slots: Sequence[int],
    *,
    window_steps: int,
    prefetch: int,
    slots_per_task: int,
    cpus_per_task: float,
    num_streams: int,
    node_label: str | None,
) -> Iterator[SlotBatch]:
    """The given slots of the given steps, in order, decoded by Ray Data tasks.

    Args:
        plan: the plan.
        steps: steps still to be computed.
        slots: this rank's slots of each step.
        window_steps: steps of one pipeline; the next is started when half of a window has been handed out.
        prefetch: slots held ready in this process.
        slots_per_task: slots that one task reads.
        cpus_per_task: CPUs that Ray reserves for a task.
        num_streams: streams that run beside each other, one a rank: each may hold its share of the object store.
        node_label: value of the node label `role` that tasks are pinned to; None: any node.
    """
    import ray

    plan_ref = ray.put(plan)
    memory_share = 0.5 * ray.cluster_resources().get("object_store_memory", 0.0) / num_streams

    def open_window(first: int) -> _Window:
        window = [(step, slot) for step in steps[first : first + window_steps] for slot in slots]
        dataset = _slot_dataset(plan_ref, window, slots_per_task, cpus_per_task, memory_share, node_label)
        return _Window(lambda: dataset.iter_batches(batch_size=1, prefetch_batches=1, batch_format="numpy"), prefetch)

    window, following = open_window(0), None
    try:
        for first in range(0, len(steps), window_steps):
            count = len(steps[first : first + window_steps]) * len(slots)
            for index, row in enumerate(window):
                if index >= count // 2 and following is None and first + window_steps < len(steps):
                    following = open_window(first + window_steps)
                batch = _to_batch(row)
                yield batch if batch.valid.all() else _read_again(plan_ref, batch, cpus_per_task, node_label)
            if following is not None:
                window, following = following, None
    finally:
        window.close()
        if following is not None:
            following.close()


def _slot_dataset(
    plan_ref: Any,
    window: list[SlotKey],
    slots_per_task: int,
    cpus_per_task: float,
    memory_share: float,
    node_label: str | None,
) -> Any:
    import ray.data
    from ray.data import ExecutionOptions, ExecutionResources

    def read_rows(rows: dict[str, NDArray[np.int64]]) -> dict[str, Any]:
        plan = ray.get(plan_ref)
        batches = [read_slot(plan, *window[index]) for index in rows["id"].tolist()]
        fields = ("step", "slot", "clips", "valid", "digest")
        return {name: np.stack([np.asarray(getattr(batch, name)) for batch in batches]) for name in fields}

    num_tasks = -(-len(window) // slots_per_task)
    pinned = {"label_selector": {"role": node_label}} if node_label else {}
    dataset = ray.data.range(len(window), override_num_blocks=num_tasks).map_batches(
        read_rows, batch_size=slots_per_task, num_cpus=cpus_per_task, **pinned
    )
    limits = ExecutionResources(object_store_memory=memory_share)
    dataset.context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limits)
    dataset.context.enable_progress_bars = False
    dataset.context.custom_execution_callback_classes.append(_breather())
    return dataset


def _breather() -> type[Any]:
    """A pause in every turn of Ray Data's control loop.

    While finished blocks wait for their consumer the loop of Ray 2.60 turns without pause, in the process that trains:
    measured, it took more of a core than the training did.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Breather(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            time.sleep(LOOP_PAUSE_SECONDS)

    return Breather


def _to_batch(row: dict[str, Any]) -> SlotBatch:
    return SlotBatch(int(row["step"][0]), int(row["slot"][0]), row["clips"][0], row["valid"][0], int(row["digest"][0]))


def _read_again(plan_ref: Any, batch: SlotBatch, cpus_per_task: float, node_label: str | None) -> SlotBatch:
    """A slot with unreadable clips is read once more, by a task of its own, before its clips are given up."""
    import ray

    placed = {"label_selector": {"role": node_label}} if node_label else {"scheduling_strategy": "SPREAD"}
    reader = ray.remote(num_cpus=cpus_per_task, **placed)(read_slot)
    again: SlotBatch = ray.get(reader.remote(plan_ref, batch.step, batch.slot))
    return again


class _Window:
    """One pipeline, run by a thread of its own that keeps a few rows ready."""

    _END = object()

    def __init__(self, open_rows: Callable[[], Iterator[Any]], prefetch: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, prefetch))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(open_rows,), name="clip-stream", daemon=True)
        self._thread.start()

    def _fill(self, open_rows: Callable[[], Iterator[Any]]) -> None:
        try:
            for row in open_rows():
                if not self._put(row):
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
        """Stop the pipeline."""
        self._closed.set()
        self._thread.join(timeout=5)
