"""Batch of one slot: its clips, read from the frame store, decoded and cropped."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dora_ray.clips.contents import Contents, SlotKey
from dora_ray.clips.crop import crop_clip
from dora_ray.clips.plan import Clip, Plan
from dora_ray.errors import VideoError
from dora_ray.store.datasets import fetch, read_rows
from dora_ray.store.hangs import UNWATCHED, Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SlotBatch:
    """M clips of one slot.

    Attributes:
        step: step of the run.
        slot: slot of the step.
        clips: (M, T, H, W, 3) uint8; zeros where not valid.
        valid: (M,) True where the clip could be decoded.
        digest: hash of the clips' numbers, videos, frames and pixels, for the ledger; a signed 64-bit integer.
        final: False if another process should retry the clips that this one could not read.
    """

    step: int
    slot: int
    clips: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    digest: int
    final: bool


def read_slots(contents: Contents, keys: Sequence[SlotKey], watch: Watch) -> list[SlotBatch]:
    """Read several slots with `read_slot`; clip i of the k-th slot is item k M + i of the watch.

    Datasets are copied first and unwatched: a copy takes long, is no clip's fault, and must not be killed and
    restarted.
    """
    plan = contents.plan
    for number in {int(plan.starts[start, 0]) for key in keys for start in key.starts if start >= 0}:
        video = contents.videos[number]
        fetch(video.uri, video.identity, video.cache)
    return [
        read_slot(contents, key, watch=watch, first_item=number * plan.clips_per_slot)
        for number, key in enumerate(keys)
    ]


def read_slot(contents: Contents, key: SlotKey, *, watch: Watch = UNWATCHED, first_item: int = 0) -> SlotBatch:
    """Read, decode and crop the clips of one slot. An unreadable clip is marked invalid, never dropped.

    Args:
        contents: readable slots of the plan.
        key: rows of the slot.
        watch: notified before each clip is read.
        first_item: the watch's item number of the slot's first clip.
    """
    plan = contents.plan
    numbers = plan.slot_numbers(key.step, key.slot)
    # If nothing in its window is readable, the clip as drawn is named in the warning.
    clips = [
        plan.clip(number) if start < 0 else plan.clip_at(number, start)
        for number, start in zip(numbers, key.starts.tolist(), strict=True)
    ]
    boxes = plan.slot_boxes(key.step, key.slot, clips)
    shape = (len(clips), plan.num_frames, plan.clip_size, plan.clip_size, 3)
    pixels, valid, final = np.zeros(shape, np.uint8), np.zeros(len(clips), np.bool_), True
    for i, (clip, box) in enumerate(zip(clips, boxes, strict=True)):
        if key.starts[i] < 0:
            _warn(plan, clip, "no clip of its window is readable and free of cuts")
            continue
        if first_item + i in watch.given_up:
            _warn(plan, clip, "reading it hangs or ends its process")
            continue
        watch.begin(first_item + i)
        try:
            frames = read_rows(contents.videos[clip.video], int(key.versions[i]), key.rows[i])
            pixels[i] = crop_clip(frames, box, plan.clip_size)
            valid[i] = True
        except (VideoError, OSError) as error:
            _warn(plan, clip, str(error))
            final = False
    return SlotBatch(key.step, key.slot, pixels, valid, _digest(clips, pixels), final)


def _warn(plan: Plan, clip: Clip, reason: str) -> None:
    video = plan.videos[clip.video]
    logger.warning(
        "clip %d (%s, %.2f s) cannot be read: %s", clip.number, video.path, video.times[clip.frames[0]], reason
    )


def _digest(clips: list[Clip], pixels: NDArray[np.uint8]) -> int:
    """Hash the decoded content: numbers, videos, frames and pixels."""
    names = np.array([[clip.number, clip.video, *clip.frames] for clip in clips], np.int64)
    # The fastest hash of the standard library on processors with SHA instructions.
    state = hashlib.sha256(names.tobytes())
    state.update(pixels.data)
    return int.from_bytes(state.digest()[:8], "little", signed=True)
