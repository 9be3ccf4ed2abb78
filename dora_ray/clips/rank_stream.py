"""One rank's end of the clip stream: its slots of each step, out of its shard of the group's dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from dora_ray import errors
from dora_ray.clips.dataset import (
    AHEAD_SLOTS,
    Begin,
    StreamSettings,
    execution_end,
    from_row,
    is_waiting,
    say_begin,
    say_taken,
)
from dora_ray.clips.plan import Plan, slots_of_rank
from dora_ray.clips.slot import SlotBatch
from dora_ray.errors import ClusterError, DoRAError
from dora_ray.ray_internals import blocked_seconds

if TYPE_CHECKING:
    from ray.data import DataIterator

# How often a rank without clips looks whether the source waits.
WAIT_SECONDS = 5.0


class RankStream:
    """One rank's slots of each step.

    Reading begins with `start`, at the step that rank 0 expects to go on from, while this rank still loads its state;
    `steps` begins anew where that was another step.
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
        """Keep this rank's part.

        Args:
            shard: this rank's.
            plan: the plan.
            settings: of the stream.
            rank: this rank.
            size: ranks W.
            is_alive: called now and then while the source waits for the ingest.
            new_shard: gives this rank a shard of the next execution, on all ranks together; None: the old one serves.
        """
        self._plan, self._settings, self._rank, self._size = plan, settings, rank, size
        self._is_alive, self._new_shard = is_alive, new_shard
        self._shard = shard
        # Seconds in shards that are used up, by stage.
        self._blocked = dict.fromkeys(blocked_seconds(shard), 0.0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clips")
        self._rows: Iterator[Any] = iter(())
        self._next: Future[Any] = Future()

    def start(self, step: int) -> None:
        """Begin to read; `step` counts on rank 0."""
        if self._rank == 0:
            say_begin(self._settings.run, Begin(step, self._size))
        self._rows = iter(
            self._shard.iter_batches(batch_size=1, prefetch_batches=self._settings.prefetch, batch_format="numpy")
        )
        self._ask()

    def _ask(self) -> None:
        self._next = self._thread.submit(next, self._rows, None)

    def _row(self) -> Any:
        """The row that was asked for; None at the end."""
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
        """Give this rank's slots of each step from `begin` on.

        Raises:
            DoRAError: what the source or a task ended with; other ranks need not meet it at the same step.
        """
        while begin < self._settings.num_steps:
            yield from self._execution(begin)
            begin = execution_end(begin, self._plan.slots, self._settings)
            if begin < self._settings.num_steps:
                if self._new_shard is not None:
                    self._blocked, self._shard = self.blocked(), self._new_shard()
                self.start(begin)

    def blocked(self) -> dict[str, float]:
        """Return the seconds so far in which this rank waited for rows, by Ray Data's stage."""
        now = blocked_seconds(self._shard)
        return {stage: seconds + now[stage] for stage, seconds in self._blocked.items()}

    def _execution(self, begin: int) -> Iterator[list[SlotBatch]]:
        batches, said = self._batches(begin), 0
        for step in range(begin, execution_end(begin, self._plan.slots, self._settings)):
            mine = slots_of_rank(self._rank, self._size, self._plan.slots, step=step, begin=begin)
            found = list(islice(batches, len(mine)))
            keys = [(batch.step, batch.slot) for batch in found]
            if keys != [(step, slot) for slot in mine]:
                raise ClusterError(f"step {step}: rank {self._rank} was given the slots {keys} in place of {mine}")
            taken = (step + 1 - begin) * self._plan.slots
            if self._rank == 0 and taken - said >= AHEAD_SLOTS // 8:
                said = taken
                say_taken(self._settings.run, taken)
            yield found
        self._rows = iter(())  # which ends Ray's iteration: its last row was taken, its end not asked for

    def _batches(self, begin: int) -> Iterator[SlotBatch]:
        row = self._row()
        if row is None or int(row["numbers"][0, 0, 0]) != begin:
            # Rank 0 has not gone on from the checkpoint that it had expected: on all ranks alike.
            self.start(begin)
            row = self._row()
        while row is not None:
            yield from from_row(row)
            # Not before it is wanted: Ray fetches rows ahead by itself, and counts from here on as this rank's wait.
            self._ask()
            row = self._row()


def cause_of(error: BaseException) -> BaseException:
    """Return the error of ours that one of Ray's was made of, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray makes a class of its own below ours, which says the whole traceback, and adds lines of advice.
        if isinstance(seen, DoRAError) and type(seen).__module__ == errors.__name__:
            return type(seen)(str(seen).partition("\n")[0])
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error
