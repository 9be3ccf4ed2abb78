"""The clip stream of a Ray Train group: one Ray Data dataset that reads slots on any node, in the plan's order.

    SlotRows (a source, one task) -> map_batches(RowReader) on decode nodes -> streaming_split(W) -> a shard a rank

A row is what one task reads and one rank gets at a time: `slots_per_task` slots that are W slots apart, since ranks
take slots in turns. It is a block of its own, and blocks are given out in turns, too: block j goes to rank j mod W.
Ray promises no such order, so every rank checks its keys. The source begins at the step that rank 0 says, which is all
there is to resuming; it yields a row when its slots are in the store, and stays at most AHEAD_SLOTS ahead of what
training has taken. After EXECUTION_ROWS the group makes itself new shards: the actor that deals the blocks out keeps
some kilobytes of native memory for each.
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
from dora_ray.clips.slot import SlotBatch, read_slots
from dora_ray.errors import DoRAError
from dora_ray.store.hangs import TaskWatch

if TYPE_CHECKING:
    from ray.data import DataIterator

logger = logging.getLogger(__name__)

NAME = "clips"
NAMESPACE = "dora-ray-stream"
# Rows that may be given to Ray Data before training has taken them: enough that hundreds of CPUs are asked for.
AHEAD_SLOTS = 512
# How often the source looks again: for what training has taken, and for what the ingest has stored.
LOOK_SECONDS = 0.1
# A source that waits says so every LOOK_SECONDS; on a busy machine it may be late.
STILL_WAITING_SECONDS = 60.0
# Rows of an execution. Its end costs a second without clips, its length 10 KB of memory a row.
EXECUTION_ROWS = 8_000
# Ray keeps a result of up to 100 KiB in the memory of the actor that deals the rows out, and leaves it there for good
# once a rank has borrowed it: 800 MB an execution. Larger ones are in the object store, and given back.
LEAST_ROW_BYTES = 128 * 1024
READ_AGAIN = {"num_cpus": 0, "scheduling_strategy": "SPREAD", "runtime_env": reading.ENVIRONMENT}  # how its task runs
# Of the object store, for slots that are ready or under way.
READY_SHARE = 0.3
# Tasks at a time where no CPU is free for them.
CROWDED_TASKS = 2


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a clip stream; none of them changes what it holds.

    Attributes:
        run: name under which rank 0 says where the stream begins, unique in the cluster.
        num_steps: step at which it ends.
        slots_per_task: slots of a row.
        prefetch: rows fetched ahead in each training worker.
        decode_cpus: CPUs that Ray reserves for a task.
        decode_label: value of the node label `role` that tasks are pinned to; None: any node.
        decode_seconds: the longest that a clip may take before its process is ended.
        execution_rows: rows after which the group makes itself new shards.
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
    """Where a stream begins, as rank 0 says it."""

    step: int
    world_size: int


def say_begin(run: str, begin: Begin) -> None:
    """Have the next iteration over a run's dataset begin there."""
    say_taken(run, 0)
    _say(run, "begin", [begin.step, begin.world_size])


def say_taken(run: str, slots: int) -> None:
    """Let the source go on: training has taken so many slots since the stream's beginning."""
    _say(run, "taken", slots)


def say_ingest_ended(run: str, error: DoRAError | None) -> None:
    """Tell the source that nothing more will be stored, and what the ingest failed with."""
    _say(run, "ingest", None if error is None else [type(error).__name__, str(error)])


def forget_ingest(run: str) -> None:
    """Make ready for another ingest beside a run of that name."""
    ray_internals.delete_value(f"ingest {run}", namespace=NAMESPACE)


def has_ended(run: str) -> bool:
    """Note that the source waits; return whether the ingest has ended, or raise what it failed with."""
    _say(run, "waiting", time.time())
    known = ray_internals.get_value(f"ingest {run}", namespace=NAMESPACE)
    failure = json.loads(known) if known is not None else None
    if failure is not None:
        raise getattr(errors, failure[0])(failure[1])
    return known is not None


def is_waiting(run: str) -> bool:
    """Return whether the source waits for the ingest, so that a rank without clips is none that hangs."""
    known = ray_internals.get_value(f"waiting {run}", namespace=NAMESPACE)
    return known is not None and time.time() - float(json.loads(known)) < STILL_WAITING_SECONDS


def _say(run: str, what: str, value: Any) -> None:
    ray_internals.put_value(f"{what} {run}", json.dumps(value), namespace=NAMESPACE)


def _heard(run: str, what: str) -> Any:
    known = ray_internals.get_value(f"{what} {run}", namespace=NAMESPACE)
    assert known is not None
    return json.loads(known)


class SlotRows(Datasource):
    """The keys of all rows from where rank 0 says on, from one task that ends with the training."""

    def __init__(self, contents: tuple[Any], settings: StreamSettings) -> None:
        """Keep what the task needs.

        Args:
            contents: reference to the plan's contents, in a tuple.
            settings: of the stream.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._contents, self._settings = contents, settings

    def estimate_inmemory_data_size(self) -> int | None:
        """Return nothing: it is not known."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """Return the one task."""
        contents, settings = self._contents, self._settings

        def read() -> Iterator[Any]:
            import pyarrow as pa

            for keys in _rows(unpacked(*contents), settings):
                yield pa.table({"keys": pa.array([pack(keys)], pa.binary())})

        return [ReadTask(read, BlockMetadata(None, None, None, None))]


def _rows(contents: Contents, settings: StreamSettings) -> Iterator[list[SlotKey]]:
    """The keys of each row, when they are there and training is near enough.

    A row waits for all slots of the steps that any rank's row beside it is of: so all ranks wait for the same step in
    their streams, and none in a sum for one that waits.
    """
    plan, begin = contents.plan, Begin(*_heard(settings.run, "begin"))
    total = (execution_end(begin.step, plan.slots, settings) - begin.step) * plan.slots
    slots = (divmod(begin.step * plan.slots + i, plan.slots) for i in range(total))
    keys = slot_keys(contents, slots, functools.partial(has_ended, settings.run))
    ready: dict[int, SlotKey] = {}
    found = taken = 0
    span = settings.slots_per_task * begin.world_size
    for row in row_slots(begin, settings, plan.slots):
        while row[-1] >= taken + max(AHEAD_SLOTS, 2 * span):
            time.sleep(LOOK_SECONDS)
            taken = int(_heard(settings.run, "taken"))
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
    """Return the step at which an execution that begins at a step ends."""
    return min(settings.num_steps, begin + max(1, settings.execution_rows * settings.slots_per_task // slots))


def row_slots(begin: Begin, settings: StreamSettings, slots: int) -> Iterator[range]:
    """The slots of each row, counted from the stream's beginning; row j is rank j mod W's.

    With W ranks and q slots a row, ranks take slots in turns, and row i W + r holds the i-th q of rank r's.
    """
    total = (execution_end(begin.step, slots, settings) - begin.step) * slots
    span = settings.slots_per_task * begin.world_size
    for first in range(0, total, span):
        for rank in range(begin.world_size):
            if first + rank < total:
                yield range(first + rank, min(first + span, total), begin.world_size)


class RowReader:
    """The task: read the slots of a row."""

    def __init__(self, contents: Any, seconds: float) -> None:
        self._contents, self._seconds = contents, seconds

    def __call__(self, rows: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Give a row of batches for each row of keys."""
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
    """A slot with unreadable clips is read once more, elsewhere, before its clips are given up."""
    with TaskWatch(seconds) as watch:
        return read_slots(unpacked(*contents), [key], watch)[0]


@functools.lru_cache(maxsize=2)
def unpacked(reference: Any) -> Contents:
    """Return the contents behind a reference, unpacked once in a process."""
    found: Contents = ray.get(reference)
    return found


def _to_row(batches: list[SlotBatch]) -> dict[str, Any]:
    """One row, of arrays with a slot in each line."""
    numbers = [[batch.step, batch.slot, batch.digest] for batch in batches]
    clips = np.stack([batch.clips for batch in batches])[None]
    return {
        "numbers": np.array([numbers], np.int64),
        "clips": clips,
        "valid": np.stack([batch.valid for batch in batches])[None],
        "filler": np.zeros((1, max(1, LEAST_ROW_BYTES - clips.nbytes)), np.uint8),
    }


def from_row(row: Mapping[str, NDArray[Any]]) -> list[SlotBatch]:
    """Return the batches of a row that a task gave."""
    parts = zip(row["numbers"][0].tolist(), row["clips"][0], row["valid"][0], strict=True)
    return [SlotBatch(step, slot, clips, valid, digest, final=True) for (step, slot, digest), clips, valid in parts]


def make_clips(contents: Any, settings: StreamSettings) -> Dataset:
    """Make the dataset: Ray Train calls it in its controller for each worker group, once their CPUs are reserved.

    Args:
        contents: reference to the plan's contents, in a tuple, so that tasks get the reference itself.
        settings: of the stream.
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
    context.target_max_block_size = 1  # a block for each row
    context.enable_progress_bars = context.print_on_execution_start = False
    ray_internals.pace_execution(context)
    memory = READY_SHARE * ray.cluster_resources().get("object_store_memory", 0.0)
    # gpu=0: no GPU node is asked for to decode.
    limits = ExecutionResources(object_store_memory=memory, gpu=0)
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=limits)
    return dataset


class RankShards(ray.train.DataConfig):  # type: ignore[misc]
    """Deals the rows out in turns; Ray Train's own would cut off the last ones, so that all ranks have equally many."""

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, DataIterator]]:
        """See DataConfig."""
        return [{NAME: shard} for shard in deal(datasets[NAME], world_size)]


def deal(dataset: Dataset, world_size: int) -> list[DataIterator]:
    """Return the shard of each rank of a dataset that `make_clips` made."""
    shards: list[DataIterator] = dataset.streaming_split(world_size, equal=False)
    return shards


def nodes(label: str | None) -> list[dict[str, Any]]:
    """Return the living nodes, those with that value of the label `role` if one is given."""
    return [node for node in ray.nodes() if node["Alive"] and label in (None, node["Labels"].get("role"))]


def free_cpus() -> dict[str, float]:
    """Return CPUs of each node beside those that placement groups, the training workers', hold there.

    Counted from the reservations, since what is free at this moment says nothing about what will be.
    """
    from ray.util import placement_group_table

    left = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in nodes(None)}
    for group in placement_group_table().values():
        for index, node in group["bundles_to_node_id"].items() if group["state"] == "CREATED" else ():
            if node in left:
                left[node] -= group["bundles"][index].get("CPU", 0.0)
    return left


def has_room(cpus: float) -> bool:
    """Return whether a node has so many CPUs that are not reserved.

    Where the training workers have taken every CPU, a task that asks for one would wait for ever: it runs beside them.
    """
    if max(free_cpus().values(), default=0.0) >= cpus:
        return True
    logger.warning(
        "every CPU of the cluster is reserved, so clips are read beside the training workers: lower "
        "cluster.cpus_per_worker, or add nodes that decode"
    )
    return False
