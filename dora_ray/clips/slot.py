"""A slot's batch: its clips read, decoded and cropped, from the frame store or from decoded segments."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dora_ray.clips.crop import crop_clip
from dora_ray.clips.direct import DecodedSegment
from dora_ray.clips.plan import Clip, Plan
from dora_ray.errors import VideoError
from dora_ray.store.frames import StoredVideo, fetch, read_frames
from dora_ray.store.supervision import UNWATCHED, Watch

logger = logging.getLogger(__name__)

SlotKey = tuple[int, int]


@dataclass(frozen=True, eq=False)
class SlotBatch:
    """The M clips of one slot.

    Attributes:
        step: step of the run.
        slot: slot of the step.
        clips: (M, T, H, W, 3) uint8; zeros where not valid.
        valid: (M,) whether the clip could be decoded.
        digest: hash of the clips' numbers, videos, frames and pixels, for the ledger; a signed 64-bit integer.
        final: False where another worker may still be able to read what this one could not.
    """

    step: int
    slot: int
    clips: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    digest: int
    final: bool


def read_slots(
    plan: Plan, keys: Sequence[SlotKey], segments: Mapping[int, DecodedSegment], watch: Watch
) -> list[SlotBatch]:
    """Read several slots, as `read_slot` does; the watch knows clip i of the k-th by k M + i.

    Copies of datasets are made first: that takes long, is no clip's fault, and must not be ended and begun anew.
    """
    for number in {clip.video for key in keys for clip in plan.slot_clips(*key)}:
        video = plan.videos[number]
        if isinstance(video, StoredVideo):
            fetch(video)
    return [
        read_slot(plan, *key, segments, watch=watch, first_item=number * plan.clips_per_slot)
        for number, key in enumerate(keys)
    ]


def read_slot(
    plan: Plan,
    step: int,
    slot: int,
    segments: Mapping[int, DecodedSegment] | None = None,
    *,
    watch: Watch = UNWATCHED,
    first_item: int = 0,
) -> SlotBatch:
    """Read, decode and crop the clips of one slot. A clip that cannot be read is marked, never dropped.

    Args:
        plan: the plan.
        step: step of the run.
        slot: slot of the step.
        segments: the decoded segments that the slot's clips are in; not given: the plan is of a frame store.
        watch: told each clip before it is read.
        first_item: what the watch knows the slot's first clip by.
    """
    clips = plan.slot_clips(step, slot)
    boxes = plan.slot_boxes(step, slot, clips)
    shape = (len(clips), plan.num_frames, plan.clip_size, plan.clip_size, 3)
    pixels, valid, final = np.zeros(shape, np.uint8), np.zeros(len(clips), np.bool_), True
    for i, (clip, box) in enumerate(zip(clips, boxes, strict=True)):
        if first_item + i in watch.given_up or _hangs(clip, segments):
            _warn(plan, clip, "reading it hangs or ends its process")
            continue
        watch.begin(first_item + i)
        try:
            pixels[i] = crop_clip(_frames(plan, clip, segments), box, plan.clip_size)
            valid[i] = True
        except (VideoError, OSError) as error:
            _warn(plan, clip, str(error))
            final = False
    return SlotBatch(step, slot, pixels, valid, _digest(clips, pixels), final)


def _hangs(clip: Clip, segments: Mapping[int, DecodedSegment] | None) -> bool:
    """Whether decoding one of its frames was given up, elsewhere too."""
    if clip.segment is None or segments is None:
        return False
    return bool(np.isin(clip.frames, segments[clip.segment].given_up).any())


def _frames(plan: Plan, clip: Clip, segments: Mapping[int, DecodedSegment] | None) -> list[NDArray[np.uint8]]:
    if clip.segment is not None:
        assert segments is not None
        return segments[clip.segment].read(clip.frames)
    video = plan.videos[clip.video]
    assert isinstance(video, StoredVideo)
    return read_frames(video, clip.frames)


def _warn(plan: Plan, clip: Clip, reason: str) -> None:
    video = plan.videos[clip.video]
    logger.warning(
        "clip %d (%s, %.2f s) cannot be read: %s", clip.number, video.path, video.times[clip.frames[0]], reason
    )


def _digest(clips: list[Clip], pixels: NDArray[np.uint8]) -> int:
    """Hash of what was decoded: numbers, videos, frames and pixels."""
    names = np.array([[clip.number, clip.video, *clip.frames] for clip in clips], np.int64)
    # Of the hashes in the standard library the fastest on processors that have instructions for it.
    state = hashlib.sha256(names.tobytes())
    state.update(pixels.data)
    return int.from_bytes(state.digest()[:8], "little", signed=True)
