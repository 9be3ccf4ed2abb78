"""Slots in the plan's order out of many tasks at once: what to decode when, apart from who decodes it.

An engine runs two kinds of work: decoding a segment, and reading the clips of a few slots, the latter from the frame
store or from decoded segments. The pipeline hands the engine work in the order of the steps, holds as much of it in
flight as it is told, and, while a slot lives on one pool of segments, has the next pool decoded in the background. It
knows no windows, so nothing stalls at the boundary of an epoch, and beginning at any step costs the pools at hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from dora_ray.clips.plan import Plan
from dora_ray.clips.segments import SegmentPlan
from dora_ray.clips.slot import SlotBatch, SlotKey

# Of the tasks that can run at a time, for segments that nobody waits for yet: slots are read beside them.
WARMING_SHARE = 0.75


class Engine(Protocol):
    """Who does the work. Handles are its own: the pipeline only keeps them and gives them back."""

    def decode(self, segment: int, *, again: bool = False) -> Any:
        """Begin to decode a segment; `again`: somewhere else, after it could not be read whole."""

    def read(self, keys: Sequence[SlotKey], segments: Mapping[int, Any], *, again: bool = False) -> Any:
        """Begin to read slots, from decoded segments if the plan has such."""

    def result(self, handle: Any) -> list[SlotBatch]:
        """Wait for slots."""

    def unfinished(self, handles: list[Any]) -> list[Any]:
        """Those of the handles whose work is not done yet."""

    def capacity(self) -> int:
        """Tasks that can run at a time, as things are now: at least 1."""

    def close(self) -> None:
        """Drop all work."""


def slots_in_order(
    plan: Plan, keys: Iterator[SlotKey], engine: Engine, *, slots_per_task: int, prefetch: int
) -> Iterator[SlotBatch]:
    """The slots of `keys`, in that order.

    Args:
        plan: the plan.
        keys: steps and slots, ascending in the steps.
        engine: does the work.
        slots_per_task: slots that one task reads.
        prefetch: tasks begun and not yet handed out, on top of those that keep the engine busy.
    """
    segments = _Segments(plan, engine) if isinstance(plan, SegmentPlan) else None
    pending: deque[tuple[list[SlotKey], Any]] = deque()
    try:
        while True:
            in_flight = prefetch + 2 * engine.capacity()
            while len(pending) < in_flight and (task := list(islice(keys, slots_per_task))):
                handles = segments.for_slots(task) if segments else {}
                pending.append((task, engine.read(task, handles)))
            if not pending:
                return
            task, handle = pending.popleft()
            for batch in engine.result(handle):
                yield batch if batch.final else _read_again(plan, batch, engine, segments)
    finally:
        engine.close()


def _read_again(plan: Plan, batch: SlotBatch, engine: Engine, segments: _Segments | None) -> SlotBatch:
    """A slot with unreadable clips is read once more, elsewhere, before its clips are given up."""
    key = (batch.step, batch.slot)
    handles = segments.again(batch) if segments else {}
    return engine.result(engine.read([key], handles, again=True))[0]


class _Segments:
    """The decoded segments of the pools that this rank's slots live on and will live on next."""

    def __init__(self, plan: SegmentPlan, engine: Engine) -> None:
        self._plan = plan
        self._engine = engine
        self._handles: dict[int, Any] = {}
        self._live: dict[int, frozenset[int]] = {}
        self._wanted: deque[int] = deque()
        self._warming: list[Any] = []
        self._repeated: set[int] = set()

    def for_slots(self, keys: Sequence[SlotKey]) -> dict[int, Any]:
        """The segments that the slots' clips are in; those of their next pools are begun in the background."""
        needed = {clip.segment for key in keys for clip in self._plan.slot_clips(*key) if clip.segment is not None}
        for step, slot in keys:
            now, following = self._plan.live_segments(step, slot)
            for segment in now:
                if segment not in self._handles:
                    self._handles[segment] = self._engine.decode(segment)
            self._live[slot] = frozenset((*now, *following))
            self._wanted.extend(segment for segment in following if segment not in self._wanted)
        chosen = {segment: self._handles[segment] for segment in sorted(needed)}
        self._drop_dead()
        self._warm()
        return chosen

    def again(self, batch: SlotBatch) -> dict[int, Any]:
        """The segments of a slot, those of its unreadable clips decoded anew, unless that was done before."""
        clips = self._plan.slot_clips(batch.step, batch.slot)
        bad = {clip.segment for clip, valid in zip(clips, batch.valid.tolist(), strict=True) if not valid}
        # Other slots in flight may hold the bad one too: they are read again from what was decoded for the first.
        for segment in {segment for segment in bad if segment is not None} - self._repeated:
            self._handles[segment] = self._engine.decode(segment, again=True)
            self._repeated.add(segment)
        segments = sorted({clip.segment for clip in clips if clip.segment is not None})
        for segment in segments:
            if segment not in self._handles:
                self._handles[segment] = self._engine.decode(segment)
        return {segment: self._handles[segment] for segment in segments}

    def _drop_dead(self) -> None:
        live = frozenset().union(*self._live.values())
        self._handles = {segment: handle for segment, handle in self._handles.items() if segment in live}
        self._wanted = deque(segment for segment in self._wanted if segment in live)
        self._repeated &= live

    def _warm(self) -> None:
        """Begin to decode what will be wanted next, a few at a time, so that slots are still read in between."""
        self._warming = self._engine.unfinished(self._warming)
        most = max(1, WARMING_SHARE * self._engine.capacity())
        while self._wanted and len(self._warming) < most:
            segment = self._wanted.popleft()
            if segment not in self._handles:
                self._handles[segment] = self._engine.decode(segment)
                self._warming.append(self._handles[segment])
