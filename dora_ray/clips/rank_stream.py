"""Consumer side of the clip stream: one rank's slots of each step, from its shard of the group's dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from dora_ray import errors
from dora_ray.clips.dataset import (
    AHEAD_SLOTS,
    LEAST_ROW_BYTES,
    Begin,
    StreamSettings,
    execution_end,
    from_row,
    is_waiting,
    publish_begin,
    publish_taken,
)
from dora_ray.clips.plan import Plan, slots_of_rank
from dora_ray.clips.room import rows_that_fit, store_bytes
from dora_ray.clips.slot import SlotBatch
from dora_ray.errors import ClusterError, DoRAError
from dora_ray.ray_internals import blocked_seconds

if TYPE_CHECKING:
    from ray.data import DataIterator

# Polling interval at which a rank without clips checks whether the source is waiting.
WAIT_SECONDS = 5.0


class RankStream:
    """Slots of one rank, step by step.

    `start` begins reading at the step from which rank 0 expects to resume, while this rank is still loading its
    state. `steps` restarts the stream if the run resumes from another step.
    """

    def __init__(
        self,
        shard: DataIterator,
        plan: Plan,
        settings: StreamSettings,
        *,
        rank: int,
        size: int,
        is_alive: Callable[[], None] = lambda: None,
        new_shard: Callable[[], DataIterator] | None = None,
    ) -> None:
        """Store the shard and the callbacks.

        Args:
            shard: shard of this rank.
            plan: the plan.
            settings: stream settings.
            rank: rank of this worker.
            size: number of ranks W.
            is_alive: called periodically while the source waits for the ingest.
            new_shard: collective call that returns this rank's shard of the next execution; None: reuse the shard.
        """
        self._plan, self._settings, self._rank, self._size = plan, settings, rank, size
        self._is_alive, self._new_shard = is_alive, new_shard
        self._shard = shard
        # Blocked seconds of the shards used up so far, by stage.
        self._blocked = dict.fromkeys(blocked_seconds(shard), 0.0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clips")
        self._rows: Iterator[Any] = iter(())
        self._next: Future[Any] = Future()

    def start(self, step: int) -> None:
        """Start reading. Only rank 0's `step` takes effect."""
        if self._rank == 0:
            publish_begin(self._settings.run, Begin(step, self._size))
        prefetch = rows_that_fit(self._settings.prefetch, self._row_bytes(), self._size, store_bytes())
        self._rows = iter(self._shard.iter_batches(batch_size=1, prefetch_batches=prefetch, batch_format="numpy"))
        self._ask()

    def _row_bytes(self) -> int:
        plan = self._plan
        clip_bytes = plan.num_frames * plan.clip_size**2 * 3
        return max(LEAST_ROW_BYTES, self._settings.slots_per_task * plan.clips_per_slot * clip_bytes)

    def _ask(self) -> None:
        self._next = self._thread.submit(next, self._rows, None)

    def _row(self) -> Any:
        """Return the requested row; None at the end."""
        while True:
            try:
                return self._next.result(WAIT_SECONDS)
            except TimeoutError:
                if self._next.done():
                    raise
                if is_waiting(self._settings.run):
                    self._is_alive()
            except Exception as error:
                raise cause_of(error) from error

    def steps(self, begin: int) -> Iterator[list[SlotBatch]]:
        """Yield this rank's slots of each step from `begin` on.

        Raises:
            DoRAError: the source or a task failed; other ranks may see the error at another step.
        """
        while begin < self._settings.num_steps:
            yield from self._execution(begin)
            begin = execution_end(begin, self._plan.slots, self._settings)
            if begin < self._settings.num_steps:
                if self._new_shard is not None:
                    self._blocked, self._shard = self.blocked(), self._new_shard()
                self.start(begin)

    def blocked(self) -> dict[str, float]:
        """Return the seconds that this rank has waited for rows so far, by Ray Data stage."""
        now = blocked_seconds(self._shard)
        return {stage: seconds + now[stage] for stage, seconds in self._blocked.items()}

    def _execution(self, begin: int) -> Iterator[list[SlotBatch]]:
        batches, said = self._batches(begin), 0
        for step in range(begin, execution_end(begin, self._plan.slots, self._settings)):
            mine = slots_of_rank(self._rank, self._size, self._plan.slots, step=step, begin=begin)
            found = list(islice(batches, len(mine)))
            keys = [(batch.step, batch.slot) for batch in found]
            if keys != [(step, slot) for slot in mine]:
                raise ClusterError(f"step {step}: rank {self._rank} received the slots {keys}, expected {mine}")
            taken = (step + 1 - begin) * self._plan.slots
            if self._rank == 0 and taken - said >= AHEAD_SLOTS // 8:
                said = taken
                publish_taken(self._settings.run, taken)
            yield found
        self._rows = iter(())  # ends Ray's iteration, whose last row was taken but whose end was not requested

    def _batches(self, begin: int) -> Iterator[SlotBatch]:
        row = self._row()
        if row is None or int(row["numbers"][0, 0, 0]) != begin:
            # The run did not resume from the expected checkpoint. All ranks see this alike.
            self.start(begin)
            row = self._row()
        while row is not None:
            yield from from_row(row)
            # Ask only when a row is wanted: Ray prefetches by itself, and counts the time from here as this rank's
            # wait.
            self._ask()
            row = self._row()


def cause_of(error: BaseException) -> BaseException:
    """Return our error behind one of Ray's, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray wraps it in a subclass of ours whose message holds the whole traceback and advice.
        if isinstance(seen, DoRAError) and type(seen).__module__ == errors.__name__:
            return type(seen)(str(seen).partition("\n")[0])
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
