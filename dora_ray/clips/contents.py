"""Find the frame-store rows of each slot as soon as they are stored.

A plan over fully stored videos is ready at once. While videos are still being ingested, a slot is ready once the
ingest has attempted every frame that the clips of its windows could need. A clip that would need an unreadable
frame, or would span a cut, then moves to the next valid start of its window, in the window's order. The choice
depends only on what the store finally holds, never on when it arrived: cuts are searched for only within the
frames of a segment's clips, and those frames are complete by then.

S slots a step, M clips a slot, T frames a clip, R starts of a window, F frames of a video.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dora_ray.clips.plan import Plan, Window
from dora_ray.errors import VideoError
from dora_ray.store.cuts import find_cuts
from dora_ray.store.datasets import Dataset
from dora_ray.store.frames import ComingVideo, Stored, StoredVideo, look_up

# Shortest polling interval of the store. One poll reads about half a kilobyte per stored frame, over a network perhaps,
# so that polls are also this many times their own duration apart.
LOOK_SECONDS, LOOK_TIMES = 0.1, 10.0
# Grace period after the ingest has ended, in which its last rows become visible.
LAST_LOOK_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class SlotKey:
    """Rows of the frame store that a slot is read from.

    Attributes:
        step: step of the run.
        slot: slot of the step.
        starts: (M,) int64 rows of `Plan.starts`; -1 where nothing in the clip's window can be read.
        versions: (M,) int64 version of each clip's dataset.
        rows: (M, T) int64 rows of the dataset.
    """

    step: int
    slot: int
    starts: NDArray[np.int64]
    versions: NDArray[np.int64]
    rows: NDArray[np.int64]


def pack(keys: Sequence[SlotKey]) -> bytes:
    """Serialize keys as little-endian int64, for a table column."""
    parts = [np.concatenate([[k.step, k.slot], k.starts, k.versions, k.rows.ravel()]).astype("<i8") for k in keys]
    return np.stack(parts).tobytes()


def unpack(content: bytes, plan: Plan) -> list[SlotKey]:
    """Deserialize the keys that `pack` wrote."""
    clips, frames = plan.clips_per_slot, plan.num_frames
    numbers = np.frombuffer(content, "<i8").astype(np.int64).reshape(-1, 2 + clips * (2 + frames))
    ends = np.cumsum([2, clips, clips])
    keys = []
    for line in numbers:
        head, starts, versions, rows = np.split(line, ends)
        keys.append(SlotKey(int(head[0]), int(head[1]), starts, versions, rows.reshape(clips, frames)))
    return keys


class Contents(Protocol):
    """Slots of a plan that can be read, and where their frames are."""

    @property
    def plan(self) -> Plan:
        """The plan."""

    @property
    def videos(self) -> Sequence[Dataset]:
        """Frame stores of the videos, in the plan's order."""

    def key(self, step: int, slot: int) -> SlotKey | None:
        """Return the slot's key; None while part of the slot is not stored."""


def slot_keys(
    contents: Contents, slots: Iterable[tuple[int, int]], has_ended: Callable[[], bool]
) -> Iterator[SlotKey | None]:
    """Yield the keys of slots in order; yield None for as long as the next slot is not fully stored.

    Args:
        contents: readable slots of the plan.
        slots: (step, slot) pairs.
        has_ended: returns whether the ingest has ended; raises its error. Called before each None.

    Raises:
        VideoError: the ingest has ended, and what a slot needs is not there.
    """
    for step, slot in slots:
        ended_at = None
        while (key := contents.key(step, slot)) is None:
            if has_ended():
                # The last rows may not be visible yet.
                ended_at = ended_at or time.monotonic()
                if time.monotonic() - ended_at > LAST_LOOK_SECONDS:
                    raise VideoError(
                        f"step {step}: the ingest has ended, and the store lacks frames of the next clips. "
                        "If its files were removed, continue with --resume to ingest them again"
                    )
            yield None
        yield key


class StoredContents:
    """Slots of a plan over fully stored videos, all of whose starts are readable."""

    def __init__(self, plan: Plan, videos: Sequence[StoredVideo]) -> None:
        self.plan, self.videos = plan, videos

    def key(self, step: int, slot: int) -> SlotKey:
        """See `Contents`."""
        plan = self.plan
        starts = np.array([_row(plan, number) for number in plan.slot_numbers(step, slot)])
        found = [plan.starts[start] for start in starts]
        videos = [self.videos[int(line[0])] for line in found]
        rows = np.stack([video.rows[line[1:]] for video, line in zip(videos, found, strict=True)])
        return SlotKey(step, slot, starts, np.array([video.version for video in videos]), rows)


def _row(plan: Plan, number: int) -> int:
    window, place = plan.place(number)
    return int(window.rows[place])


class GrowingContents:
    """Slots of a plan over videos that are still being ingested."""

    def __init__(self, plan: Plan, videos: Sequence[ComingVideo]) -> None:
        self.plan, self.videos = plan, videos
        self._stored: dict[int, Stored] = {}
        self._next_look: dict[int, float] = {}
        self._valid: dict[int, NDArray[np.bool_]] = {}
        # For each cached window: the row of `Plan.starts` read at each of its places.
        self._moves: dict[int, NDArray[np.int64]] = {}

    def key(self, step: int, slot: int) -> SlotKey | None:
        """See `Contents`."""
        plan = self.plan
        starts = np.empty(plan.clips_per_slot, np.int64)
        for i, number in enumerate(plan.slot_numbers(step, slot)):
            window, place = plan.place(number)
            moves = self._moves_of(window)
            if moves is None:
                return None
            starts[i] = moves[place]
        versions = np.zeros(plan.clips_per_slot, np.int64)
        rows = np.full((plan.clips_per_slot, plan.num_frames), -1)
        for i, start in enumerate(starts.tolist()):
            if start >= 0:
                video, *frames = plan.starts[start].tolist()
                versions[i], rows[i] = self._stored[video].version, self._stored[video].rows[frames]
        return SlotKey(step, slot, starts, versions, rows)

    def _moves_of(self, window: Window) -> NDArray[np.int64] | None:
        """Return the (R,) rows of `Plan.starts` to read at the window's places; None until the window is stored."""
        if window.first not in self._moves:
            if not all(self._is_there(int(unit)) for unit in window.units):
                return None
            valid = np.concatenate([self._valid_rows(int(unit)) for unit in np.sort(window.units)])
            rows = np.concatenate([np.arange(*self.plan.units[unit, 1:]) for unit in np.sort(window.units)])
            while len(self._moves) > 2:
                self._moves.pop(next(iter(self._moves)))
            self._moves[window.first] = next_valid(window.rows, rows[valid])
        return self._moves[window.first]

    def _is_there(self, unit: int) -> bool:
        if unit in self._valid:
            return True
        video, first, last = self.plan.unit_frames(unit)
        stored = self._stored.get(video)
        if stored is None or not stored.tried[first : last + 1].all():
            stored = self._look_up(video)
        return bool(stored.tried[first : last + 1].all())

    def _look_up(self, video: int) -> Stored:
        begun = time.monotonic()
        if begun > self._next_look.get(video, -np.inf):
            self._stored[video] = look_up(self.videos[video])
            ended = time.monotonic()
            self._next_look[video] = ended + max(LOOK_SECONDS, LOOK_TIMES * (ended - begun))
        return self._stored[video]

    def _valid_rows(self, unit: int) -> NDArray[np.bool_]:
        """Return the (r,) mask of a unit's starts that are readable and, if cuts are avoided, span no cut."""
        if unit not in self._valid:
            video, first, last = self.plan.unit_frames(unit)
            stored = self._stored[video]
            frames = self.plan.starts[slice(*self.plan.units[unit, 1:]), 1:]
            valid: NDArray[np.bool_] = np.all(stored.rows[frames] >= 0, axis=1)
            if self.plan.avoid_cuts:
                shot = shots(stored.rows[first : last + 1] >= 0, stored.signatures[first : last + 1])
                valid = valid & (shot[frames[:, -1] - first] == shot[frames[:, 0] - first])
            self._valid[unit] = valid
        return self._valid[unit]


def shots(readable: NDArray[np.bool_], signatures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the (n,) shot number of each of n neighboring frames.

    Args:
        readable: (n,) True where the frame can be read.
        signatures: (n, bytes) signature of each frame.
    """
    begins = np.zeros(len(readable), bool)
    begins[readable] = find_cuts(signatures[readable])
    return np.cumsum(begins)


def next_valid(order: NDArray[np.int64], valid: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each place the value there if valid, else the next valid one, wrapping around; -1 if none is valid.

    Args:
        order: (R,) distinct values.
        valid: the valid values.

    Returns:
        (R,) int64.
    """
    places = np.flatnonzero(np.isin(order, valid))
    if not len(places):
        return np.full(len(order), -1)
    following = np.searchsorted(places, np.arange(len(order)))
    return order[places[following % len(places)]]
