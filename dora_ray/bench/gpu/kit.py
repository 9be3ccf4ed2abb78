"""Clips file: video frames, labeled images and masked sequences as uint8 arrays, for a machine without decoders.

Made by `scripts/gpu_kit.py`. Legend: F frames, M images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_ray.clips.crop import crop_clip
from dora_ray.clips.plan import Plan
from dora_ray.config import Config
from dora_ray.errors import ConfigError

Pixels = NDArray[np.uint8]
# Share of frames at the end of each stretch of video that is held out from training, for view matching.
HELD_OUT_SHARE = 0.2
# Slots read ahead.
AHEAD = 8


@dataclass(frozen=True, eq=False)
class ArrayVideo:
    """Stretch of video in memory; implements `plan.Video`.

    Attributes:
        video_id: its name.
        frames: (F, H, W, 3).
        times: (F,) seconds.
    """

    video_id: str
    frames: Pixels
    times: NDArray[np.float64]

    @property
    def path(self) -> str:
        """Name of the stretch, which has no file."""
        return self.video_id

    @property
    def digest(self) -> str:
        """Hash of the pixels."""
        return hashlib.sha256(self.frames.tobytes()).hexdigest()[:16]

    @property
    def cuts(self) -> NDArray[np.bool_]:
        """(F,) all False: a stretch is one shot."""
        return np.zeros(len(self.times), np.bool_)

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.frames.shape[2])

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.frames.shape[1])

    @property
    def edges(self) -> NDArray[np.int64]:
        """(2,) first frame and F: a stretch is one segment."""
        return np.array([0, len(self.times)])

    def part(self, rows: slice) -> ArrayVideo:
        """Return a part of the stretch."""
        return ArrayVideo(self.video_id, self.frames[rows], self.times[rows])


@dataclass(frozen=True, eq=False)
class Labeled:
    """Images of one split of a labeled set, (M, H, W, 3), with labels (M,) int64."""

    images: Pixels
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sequence:
    """Sequence with a mask for each frame: (F, H, W, 3) and (F, H, W) bool."""

    name: str
    frames: Pixels
    masks: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Kit:
    """Content of a clips file."""

    videos: tuple[ArrayVideo, ...]
    train: Labeled
    test: Labeled
    sequences: tuple[Sequence, ...]

    def trained_on(self) -> tuple[ArrayVideo, ...]:
        """Return the videos without their held-out ends."""
        return tuple(video.part(slice(0, _num_trained(video))) for video in self.videos)

    def held_out(self) -> tuple[ArrayVideo, ...]:
        """Return the held-out ends of the videos."""
        return tuple(video.part(slice(_num_trained(video), None)) for video in self.videos)


def _num_trained(video: ArrayVideo) -> int:
    return len(video.times) - round(HELD_OUT_SHARE * len(video.times))


def save_kit(kit: Kit, path: Path) -> None:
    """Write a clips file."""
    arrays: dict[str, Any] = {
        "train_images": kit.train.images,
        "train_labels": kit.train.labels,
        "test_images": kit.test.images,
        "test_labels": kit.test.labels,
        "video_names": np.array([video.video_id for video in kit.videos]),
        "sequence_names": np.array([sequence.name for sequence in kit.sequences]),
    }
    for number, video in enumerate(kit.videos):
        arrays |= {f"video_{number}": video.frames, f"times_{number}": video.times}
    for number, sequence in enumerate(kit.sequences):
        arrays |= {f"frames_{number}": sequence.frames, f"masks_{number}": sequence.masks}
    np.savez_compressed(path, **arrays)


def load_kit(path: Path) -> Kit:
    """Read a clips file.

    Raises:
        ConfigError: the file is missing or invalid.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return _kit_of(arrays)
    except (OSError, KeyError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} is not a clips file ({error}): make one with `make gpu-kit`") from error


def _kit_of(arrays: Mapping[str, Any]) -> Kit:
    return Kit(
        videos=tuple(
            ArrayVideo(str(name), arrays[f"video_{i}"], arrays[f"times_{i}"])
            for i, name in enumerate(arrays["video_names"])
        ),
        train=Labeled(arrays["train_images"], arrays["train_labels"]),
        test=Labeled(arrays["test_images"], arrays["test_labels"]),
        sequences=tuple(
            Sequence(str(name), arrays[f"frames_{i}"], arrays[f"masks_{i}"])
            for i, name in enumerate(arrays["sequence_names"])
        ),
    )


def plan_of(videos: tuple[ArrayVideo, ...], config: Config) -> Plan:
    """Plan a training on these videos.

    Raises:
        VideoError: no clip fits.
    """
    plan = Plan(
        videos=videos,
        num_frames=config.clip.num_frames,
        stride_seconds=config.clip.stride_seconds,
        avoid_cuts=False,
        seed=config.run.seed,
        slots=config.optim.slots,
        clips_per_slot=config.optim.clips_per_slot,
        clip_size=config.crops.clip_size,
        clip_scale=config.crops.clip_scale,
        aspect_ratio=config.crops.aspect_ratio,
    )
    plan.check()
    return plan


def read_array_slot(plan: Plan, step: int, slot: int) -> Any:
    """Cut the clips of one slot out of the videos in memory; return the fields of `SlotBatch` that a step needs."""
    clips = plan.slot_clips(step, slot)
    boxes = plan.slot_boxes(step, slot, clips)
    pixels = [
        crop_clip(list(_video(plan, clip.video).frames[list(clip.frames)]), box, plan.clip_size)
        for clip, box in zip(clips, boxes, strict=True)
    ]
    return SimpleNamespace(step=step, slot=slot, clips=np.stack(pixels), valid=np.ones(len(pixels), np.bool_))


def _video(plan: Plan, number: int) -> ArrayVideo:
    video = plan.videos[number]
    assert isinstance(video, ArrayVideo)
    return video


def read_steps(plan: Plan, num_steps: int) -> Iterator[list[Any]]:
    """Yield the batches of each step, read ahead by threads."""
    keys = iter([(step, slot) for step in range(num_steps) for slot in range(plan.slots)])
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1)) as pool:
        try:
            for _ in range(num_steps):
                while len(waiting) < AHEAD + plan.slots and (key := next(keys, None)) is not None:
                    waiting.append(pool.submit(read_array_slot, plan, *key))
                yield [waiting.popleft().result() for _ in range(plan.slots)]
        finally:
            pool.shutdown(cancel_futures=True)
