"""Clip stream of a Ray Train worker group: one Ray Data dataset that reads slots on any node, in the plan's order.

    SlotRows (one read task) -> map_batches(RowReader) on decode nodes -> streaming_split(W) -> one shard per rank

A row is the unit of reading and of delivery: `slots_per_task` slots, W slots apart because ranks take slots round
robin. Each row is its own block, and blocks are dealt round robin, too: block j goes to rank j mod W. Ray does not
guarantee this order, so every rank checks its keys. The source starts at the step that rank 0 publishes; resuming
needs no other state. It yields a row once its slots are stored, and stays at most AHEAD_SLOTS ahead of training.
After EXECUTION_ROWS rows the group creates new shards: Ray's split coordinator keeps kilobytes of memory per block.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
import ray.train
from numpy.typing import NDArray
from ray.data import Dataset, Datasource, ExecutionOptions, ExecutionResources, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from dora_ray import errors, ray_internals
from dora_ray.clips import reading
from dora_ray.clips.contents import Contents, SlotKey, pack, slot_keys, unpack
from dora_ray.clips.room import READY_SHARE, has_room, store_bytes
from dora_ray.clips.slot import SlotBatch, read_slots
from dora_ray.errors import DoRAError
from dora_ray.store.hangs import TaskWatch

if TYPE_CHECKING:
    from ray.data import DataIterator

logger = logging.getLogger(__name__)

NAME = "clips"
NAMESPACE = "dora-ray-stream"
# Slots submitted to Ray Data ahead of training: enough demand for hundreds of CPUs.
AHEAD_SLOTS = 512
# Polling interval of the source: for training progress, and for newly stored rows.
LOOK_SECONDS = 0.1
# A waiting source reports it every LOOK_SECONDS; the margin allows for a busy machine.
STILL_WAITING_SECONDS = 60.0
# Rows of one execution. Ending one costs a second without clips; each row costs 10 KB of memory until then.
EXECUTION_ROWS = 8_000
# Ray returns results of up to 100 KiB inline, in the memory of the split coordinator, and never frees them once a
# rank has borrowed them: 800 MB an execution. Larger results go to the object store and are freed.
LEAST_ROW_BYTES = 128 * 1024
# Options of a retry.
READ_AGAIN = {"num_cpus": 0, "scheduling_strategy": "SPREAD", "runtime_env": reading.ENVIRONMENT}
# Concurrent tasks when no CPU is free for them.
CROWDED_TASKS = 2


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a clip stream. None of them changes its content.

    Attributes:
        run: name under which rank 0 publishes where the stream begins; unique in the cluster.
        num_steps: step at which the stream ends.
        slots_per_task: slots of a row.
        prefetch: rows prefetched by each training worker.
        decode_cpus: CPUs that Ray reserves for a task.
        decode_label: value of the node label `role` that tasks are pinned to; None: any node.
        decode_seconds: time limit of a clip, after which its process is killed.
        execution_rows: rows after which the group creates new shards.
    """

    run: str
    num_steps: int
    slots_per_task: int
    prefetch: int
    decode_cpus: float
    decode_label: str | None
    decode_seconds: float
    execution_rows: int = EXECUTION_ROWS


@dataclass(frozen=True)
class Begin:
    """First step of a stream and the number of ranks, as published by rank 0."""

    step: int
    world_size: int


def publish_begin(run: str, begin: Begin) -> None:
    """Publish where the next execution of the run's dataset begins."""
    publish_taken(run, 0)
    _publish(run, "begin", [begin.step, begin.world_size])


def publish_taken(run: str, slots: int) -> None:
    """Publish the number of slots trained since the stream began, so that the source may continue."""
    _publish(run, "taken", slots)


def publish_ingest_end(run: str, error: DoRAError | None) -> None:
    """Publish that the ingest has ended, with its error if it failed."""
    _publish(run, "ingest", None if error is None else [type(error).__name__, str(error)])


def clear_ingest_end(run: str) -> None:
    """Clear the end of an earlier ingest under this run's name."""
    ray_internals.delete_value(f"ingest {run}", namespace=NAMESPACE)


def has_ended(run: str) -> bool:
    """Publish that the source is waiting; return whether the ingest has ended, or raise its error."""
    _publish(run, "waiting", time.time())
    known = ray_internals.get_value(f"ingest {run}", namespace=NAMESPACE)
    failure = json.loads(known) if known is not None else None
    if failure is not None:
        raise getattr(errors, failure[0])(failure[1])
    return known is not None


def is_waiting(run: str) -> bool:
    """Return whether the source is waiting for the ingest, so that an idle rank is not taken for a hung one."""
    known = ray_internals.get_value(f"waiting {run}", namespace=NAMESPACE)
    return known is not None and time.time() - float(json.loads(known)) < STILL_WAITING_SECONDS


def _publish(run: str, what: str, value: Any) -> None:
    ray_internals.put_value(f"{what} {run}", json.dumps(value), namespace=NAMESPACE)


def _read_value(run: str, what: str) -> Any:
    known = ray_internals.get_value(f"{what} {run}", namespace=NAMESPACE)
    assert known is not None
    return json.loads(known)


class SlotRows(Datasource):
    """Source of row keys, starting at the step that rank 0 published: one read task that lives as long as training."""

    def __init__(self, contents: tuple[Any], settings: StreamSettings) -> None:
        """Keep the task's inputs.

        Args:
            contents: reference to the plan's contents, in a tuple.
            settings: stream settings.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._contents, self._settings = contents, settings

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return the single read task."""
        contents, settings = self._contents, self._settings

        def read() -> Iterator[Any]:
            import pyarrow as pa

            for keys in _rows(unpacked(*contents), settings):
                yield pa.table({"keys": pa.array([pack(keys)], pa.binary())})

        return [ReadTask(read, BlockMetadata(None, None, None, None))]


def _rows(contents: Contents, settings: StreamSettings) -> Iterator[list[SlotKey]]:
    """Yield the keys of each row once they are stored and training is close enough.

    A row waits for every slot of the steps touched by the rows of all ranks at that position. All ranks therefore
    wait at the same step of their streams, rather than one in its stream and the others in an all-reduce.
    """
    plan, begin = contents.plan, Begin(*_read_value(settings.run, "begin"))
    total = (execution_end(begin.step, plan.slots, settings) - begin.step) * plan.slots
    slots = (divmod(begin.step * plan.slots + i, plan.slots) for i in range(total))
    keys = slot_keys(contents, slots, functools.partial(has_ended, settings.run))
    ready: dict[int, SlotKey] = {}
    found = taken = 0
    span = settings.slots_per_task * begin.world_size
    for row in row_slots(begin, settings, plan.slots):
        while row[-1] >= taken + max(AHEAD_SLOTS, 2 * span):
            time.sleep(LOOK_SECONDS)
            taken = int(_read_value(settings.run, "taken"))
        through = -(-((row[0] // span + 1) * span) // plan.slots) * plan.slots
        while found < min(through, total):
            key = next(keys)
            if key is None:
                time.sleep(LOOK_SECONDS)
            else:
                ready[found] = key
                found += 1
        yield [ready.pop(i) for i in row]


def execution_end(begin: int, slots: int, settings: StreamSettings) -> int:
    """Return the step at which an execution that begins at step `begin` ends."""
    return min(settings.num_steps, begin + max(1, settings.execution_rows * settings.slots_per_task // slots))


def row_slots(begin: Begin, settings: StreamSettings, slots: int) -> Iterator[range]:
    """Yield the slots of each row, counted from the start of the stream; row j belongs to rank j mod W.

    With W ranks and q slots a row, row i W + r holds the i-th group of q slots of rank r.
    """
    total = (execution_end(begin.step, slots, settings) - begin.step) * slots
    span = settings.slots_per_task * begin.world_size
    for first in range(0, total, span):
        for rank in range(begin.world_size):
            if first + rank < total:
                yield range(first + rank, min(first + span, total), begin.world_size)


class RowReader:
    """Map function that reads the slots of a row."""

    def __init__(self, contents: Any, seconds: float) -> None:
        self._contents, self._seconds = contents, seconds

    def __call__(self, rows: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a row of slot batches for each row of keys."""
        contents = unpacked(*self._contents)
        for packed in rows["keys"]:
            keys = unpack(packed, contents.plan)
            with TaskWatch(self._seconds) as watch:
                batches = read_slots(contents, keys, watch)
            elsewhere = ray.remote(**READ_AGAIN)(_read_elsewhere)
            again = {
                i: elsewhere.remote(self._contents, keys[i], self._seconds)
                for i, batch in enumerate(batches)
                if not batch.final
            }
            yield _to_row([ray.get(again[i]) if i in again else batch for i, batch in enumerate(batches)])


def _read_elsewhere(contents: Any, key: SlotKey, seconds: float) -> SlotBatch:
    """Retry a slot with unreadable clips in another process, before those clips are given up."""
    with TaskWatch(seconds) as watch:
        return read_slots(unpacked(*contents), [key], watch)[0]


@functools.lru_cache(maxsize=2)
def unpacked(reference: Any) -> Contents:
    """Return the contents behind a reference, deserialized once per process."""
    found: Contents = ray.get(reference)
    return found


def _to_row(batches: list[SlotBatch]) -> dict[str, Any]:
    """Return one row of arrays whose second axis is the slots."""
    numbers = [[batch.step, batch.slot, batch.digest] for batch in batches]
    clips = np.stack([batch.clips for batch in batches])[None]
    return {
        "numbers": np.array([numbers], np.int64),
        "clips": clips,
        "valid": np.stack([batch.valid for batch in batches])[None],
        "filler": np.zeros((1, max(1, LEAST_ROW_BYTES - clips.nbytes)), np.uint8),
    }


def from_row(row: Mapping[str, NDArray[Any]]) -> list[SlotBatch]:
    """Return the slot batches of a row made by `_to_row`."""
    parts = zip(row["numbers"][0].tolist(), row["clips"][0], row["valid"][0], strict=True)
    return [SlotBatch(step, slot, clips, valid, digest, final=True) for (step, slot, digest), clips, valid in parts]


def make_clips(contents: Any, settings: StreamSettings) -> Dataset:
    """Build the dataset. Ray Train's controller calls this for each worker group, once its CPUs are reserved.

    Args:
        contents: reference to the plan's contents, in a tuple, so that tasks receive the reference itself.
        settings: stream settings.
    """
    room = settings.decode_label is not None or has_room(settings.decode_cpus)
    pinned: dict[str, Any] = {"label_selector": {"role": settings.decode_label}} if settings.decode_label else {}
    dataset: Dataset = ray.data.read_datasource(
        SlotRows(contents, settings), override_num_blocks=1, num_cpus=0, runtime_env=reading.ENVIRONMENT
    )
    dataset = dataset.map_batches(
        RowReader(contents, settings.decode_seconds),
        batch_size=1,
        num_cpus=settings.decode_cpus if room else 0.0,
        compute=TaskPoolStrategy(None if room else CROWDED_TASKS),
        runtime_env=reading.ENVIRONMENT,
        **pinned,
    )
    context = dataset.context
    context.target_max_block_size = 1  # one block per row
    context.enable_progress_bars = context.print_on_execution_start = False
    ray_internals.pace_execution(context)
    # gpu=0: decoding never requests a GPU node.
    limits = ExecutionResources(object_store_memory=READY_SHARE * store_bytes(), gpu=0)
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limits)
    return dataset


class RankShards(ray.train.DataConfig):  # type: ignore[misc]
    """Deal rows round robin. Ray Train's default drops the last rows so that all ranks get equally many."""

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, DataIterator]]:
        """See `ray.train.DataConfig`."""
        return [{NAME: shard} for shard in deal(datasets[NAME], world_size)]


def deal(dataset: Dataset, world_size: int) -> list[DataIterator]:
    """Return each rank's shard of a dataset made by `make_clips`."""
    shards: list[DataIterator] = dataset.streaming_split(world_size, equal=False)
    return shards
