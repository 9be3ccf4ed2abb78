"""Plan of the clips and random numbers of every slot of every step. Pure, and identical on every machine.

Clip number n = (step * S + slot) * M + i, with S slots a step and M clips a slot. Its epoch is n // E and its
position in that epoch's order is n % E, where E is the number of possible clip starts over all videos, so a
video's weight is its length. An epoch's order is a permutation of all starts, or is shuffled by windows: the
segments are permuted, each `window_segments` of them form a window, and starts are permuted within it. Training
can then begin when the first window is stored.

S slots a step, M clips a slot, T frames a clip, E starts an epoch, F frames of a video, K segments of a video.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dora_ray.clips.crop import random_boxes
from dora_ray.clips.starts import clip_table, no_clip, refuse_without_clips

logger = logging.getLogger(__name__)


class Purpose(IntEnum):
    """Purpose of a stream of random numbers. The values are part of the plan: never renumber them."""

    EPOCH = 0
    CLIP_CROP = 1
    GLOBAL_VIEWS = 2
    LOCAL_VIEWS = 3
    HEADS = 4
    NETWORK = 5
    RANDOM_MASKS = 6
    INITIAL_WEIGHTS = 7
    SEGMENTS = 8
    WINDOW = 9


def seed_sequence(seed: int, step: int, slot: int, purpose: Purpose) -> np.random.SeedSequence:
    """Return the root seed of one purpose in one slot."""
    return np.random.SeedSequence((seed, step, slot, int(purpose)))


def slot_generator(seed: int, step: int, slot: int, purpose: Purpose) -> np.random.Generator:
    """Return a fresh NumPy generator for one purpose in one slot."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, step, slot, purpose)))


def slot_seed(seed: int, step: int, slot: int, purpose: Purpose) -> int:
    """Return a 63-bit seed for a device's generator."""
    return int(seed_sequence(seed, step, slot, purpose).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=64)
def epoch_order(seed: int, epoch: int, count: int, purpose: Purpose) -> NDArray[np.int64]:
    """Return the (count,) permutation of an epoch's starts or segments."""
    return slot_generator(seed, epoch, 0, purpose).permutation(count)


def slots_of_rank(rank: int, world_size: int, num_slots: int, *, step: int, begin: int) -> list[int]:
    """Return the slots of a step that one rank computes, in a stream that began at step `begin`.

    Ranks take slots round robin from `begin` on, so world_size need not divide num_slots and no rank gets ahead.
    """
    first = (step - begin) * num_slots
    return [slot for slot in range(num_slots) if (first + slot) % world_size == rank]


class Video(Protocol):
    """Video as seen by a plan and its readers; see `dora_ray.store.frames`."""

    @property
    def video_id(self) -> str:
        """Identifier derived from the content."""

    @property
    def path(self) -> str:
        """Path or URI of the file."""

    @property
    def digest(self) -> str:
        """Hash of the content."""

    @property
    def times(self) -> NDArray[np.float64]:
        """(F,) presentation times of the kept frames in seconds, ascending."""

    @property
    def cuts(self) -> NDArray[np.bool_]:
        """(F,) True where a frame starts a new shot."""

    @property
    def width(self) -> int:
        """Width of a kept frame in pixels."""

    @property
    def height(self) -> int:
        """Height of a kept frame in pixels."""

    @property
    def edges(self) -> NDArray[np.int64]:
        """(K + 1,) first frame of every segment, followed by F."""


@dataclass(frozen=True)
class Clip:
    """T frames of one video: the kept frames `frames` of `plan.videos[video]`. `number` is the clip number n."""

    number: int
    video: int
    frames: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Window:
    """Part of an epoch within which starts are shuffled.

    Attributes:
        first: number n of the window's first clip.
        units: (U,) rows of `Plan.units` that form the window.
        rows: (R,) rows of `Plan.starts`, in drawing order.
    """

    first: int
    units: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Everything that determines the content of a slot.

    Attributes:
        videos: the videos.
        num_frames: T.
        stride_seconds: time between a clip's frames.
        avoid_cuts: leave out clips that span a shot cut.
        seed: seed of the run.
        slots: S.
        clips_per_slot: M.
        clip_size: side of the first crop in pixels.
        clip_scale: range of the first crop's area, as a share of the frame.
        aspect_ratio: range of the first crop's width / height.
        settings: flat configuration values that shape a slot, for the digest.
        window_segments: segments of a window; 0: all starts of an epoch are shuffled together.
    """

    videos: tuple[Video, ...]
    num_frames: int
    stride_seconds: float
    avoid_cuts: bool
    seed: int
    slots: int
    clips_per_slot: int
    clip_size: int
    clip_scale: tuple[float, float]
    aspect_ratio: tuple[float, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    window_segments: int = 0

    @cached_property
    def starts(self) -> NDArray[np.int32]:
        """(E, 1 + T) video and kept frames of every clip that may be drawn."""
        tables = [
            clip_table(video.times, video.cuts, self.num_frames, self.stride_seconds, avoid_cuts=self.avoid_cuts)
            for video in self.videos
        ]
        return np.concatenate(
            [np.column_stack([np.full(len(table), i, np.int32), table]) for i, table in enumerate(tables)]
        ).astype(np.int32)

    @property
    def clips_per_epoch(self) -> int:
        """Number of clips in an epoch, E."""
        return len(self.starts)

    def check(self) -> None:
        """Warn of videos that yield no clip, since every candidate spans a shot cut or a missing frame.

        Raises:
            VideoError: no video yields a clip.
        """
        giving = set(self.starts[:, 0].tolist())
        reasons = {
            video.path: no_clip(video.times, self.num_frames, self.stride_seconds) or self._in_the_way()
            for number, video in enumerate(self.videos)
            if number not in giving
        }
        refuse_without_clips(reasons, num_videos=len(self.videos))

    def _in_the_way(self) -> str:
        cut = "a shot cut (clip.avoid_cuts=true) or " if self.avoid_cuts else ""
        return (
            f"every span of {(self.num_frames - 1) * self.stride_seconds:g} s (the length of a clip) contains {cut}"
            "a missing frame; lower clip.num_frames or clip.stride_seconds"
        )

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """(U, 3) video, first row and end row in `starts` of a window's building blocks: segments, or whole videos."""
        found = []
        for number, video in enumerate(self.videos):
            first, last = np.searchsorted(self.starts[:, 0], [number, number + 1]).tolist()
            edges = video.edges if self.window_segments else np.array([0, len(video.times)])
            bounds = first + np.searchsorted(self.starts[first:last, 1], edges)
            found += [(number, low, high) for low, high in pairwise(bounds.tolist()) if high > low]
        return np.array(found, np.int64).reshape(-1, 3)

    def unit_frames(self, unit: int) -> tuple[int, int, int]:
        """Return a unit's video, and the first and last frame that its clips use."""
        video, low, high = self.units[unit].tolist()
        frames = self.starts[low:high, 1:]
        return video, int(frames.min()), int(frames.max())

    def windows(self, epoch: int) -> list[Window]:
        """Return the windows of an epoch, in drawing order."""
        if epoch not in self._windows:
            for known in sorted(self._windows)[:-1]:
                self._windows.pop(known, None)
            self._windows[epoch] = self._draw_windows(epoch)
        return self._windows[epoch]

    @cached_property
    def _windows(self) -> dict[int, list[Window]]:
        return {}

    def _draw_windows(self, epoch: int) -> list[Window]:
        first = epoch * self.clips_per_epoch
        if not self.window_segments:
            rows = epoch_order(self.seed, epoch, self.clips_per_epoch, Purpose.EPOCH)
            return [Window(first, np.arange(len(self.units)), rows)]
        order = epoch_order(self.seed, epoch, len(self.units), Purpose.SEGMENTS)
        drawn = []
        for number, begin in enumerate(range(0, len(order), self.window_segments)):
            units = order[begin : begin + self.window_segments]
            rows = np.concatenate([np.arange(*self.units[unit, 1:]) for unit in units])
            rng = slot_generator(self.seed, epoch, number, Purpose.WINDOW)
            drawn.append(Window(first, units, rng.permutation(rows)))
            first += len(rows)
        return drawn

    def place(self, number: int) -> tuple[Window, int]:
        """Return the window of clip number n, and the clip's position in it."""
        windows = self.windows(number // self.clips_per_epoch)
        window = windows[bisect_right(windows, number, key=lambda window: window.first) - 1]
        return window, number - window.first

    def clip(self, number: int) -> Clip:
        """Return clip number n as drawn. Unreadable frames may move it, see `contents`."""
        window, place = self.place(number)
        return self.clip_at(number, int(window.rows[place]))

    def clip_at(self, number: int, row: int) -> Clip:
        """Return clip number n, starting at a row of `starts`."""
        video, *frames = self.starts[row].tolist()
        return Clip(number, video, tuple(frames))

    def slot_clips(self, step: int, slot: int) -> list[Clip]:
        """Return the M clips of a slot, as drawn."""
        return [self.clip(number) for number in self.slot_numbers(step, slot)]

    def slot_numbers(self, step: int, slot: int) -> range:
        """Return the clip numbers of a slot."""
        first = (step * self.slots + slot) * self.clips_per_slot
        return range(first, first + self.clips_per_slot)

    def slot_boxes(self, step: int, slot: int, clips: Sequence[Clip]) -> list[NDArray[np.float64]]:
        """Return the (4,) first crop of each clip of a slot: top, left, height, width in stored pixels."""
        rng = slot_generator(self.seed, step, slot, Purpose.CLIP_CROP)
        videos = [self.videos[clip.video] for clip in clips]
        return [
            random_boxes(
                rng, count=1, height=video.height, width=video.width, scale=self.clip_scale, ratio=self.aspect_ratio
            )[0]
            for video in videos
        ]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Content of the plan by key, compared when a run is resumed."""
        videos = [[video.video_id, _video_digest(video)] for video in self.videos]
        return {"seed": self.seed, "videos": videos, **{key: self.settings[key] for key in sorted(self.settings)}}

    @cached_property
    def digest(self) -> str:
        """Hash of `fingerprint`."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _video_digest(video: Video) -> str:
    parts = (video.digest.encode(), np.asarray(video.times).tobytes(), np.packbits(video.cuts).tobytes())
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]
