"""Decoding a segment: once, into a small frame store of its own in memory, from which its clips are then read.

The kept frames are scaled and JPEG-coded exactly as the frame store's, so a clip has the same pixels from either
source, and a segment waits in a tenth of the memory that its ready clips would take.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from dora_ray.clips.segments import SegmentPlan, StreamedVideo
from dora_ray.errors import VideoError
from dora_ray.store.supervision import UNWATCHED, Watch
from dora_ray.video.decoders import DecodedFrame, get_decoder
from dora_ray.video.sources import check_unchanged

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DecodedSegment:
    """The frames of one segment; plain arrays, which Ray shares between processes without copying.

    Attributes:
        path: the video file.
        frames: (n,) int64 numbers of the kept frames that could be decoded, ascending.
        ends: (n,) int64 end of each picture in `jpegs`.
        jpegs: (bytes,) uint8, one JPEG after the other.
        given_up: (g,) int64 numbers of frames that were not tried, since decoding them hangs.
    """

    path: str
    frames: NDArray[np.int64]
    ends: NDArray[np.int64]
    jpegs: NDArray[np.uint8]
    given_up: NDArray[np.int64]

    def read(self, frames: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The kept frames of those numbers, in that order: (H, W, 3) uint8 RGB each.

        Raises:
            VideoError: one of them could not be decoded.
        """
        places = np.searchsorted(self.frames, frames)
        found = places < len(self.frames)
        found[found] = self.frames[places[found]] == np.asarray(frames)[found]
        if not found.all():
            raise VideoError(f"{self.path}: {int((~found).sum())} of {len(frames)} frames could not be decoded")
        begins = np.concatenate([[0], self.ends[:-1]])
        return [simplejpeg.decode_jpeg(self.jpegs[begins[i] : self.ends[i]], "RGB") for i in places.tolist()]


def decode_segment(plan: SegmentPlan, segment: int, watch: Watch = UNWATCHED) -> DecodedSegment:
    """Decode one segment. Frames that cannot be decoded are left out; a file that cannot be read has none.

    Args:
        plan: the plan.
        segment: number in `plan.segments`.
        watch: told each kept frame before it is decoded; groups of pictures that hold given-up frames are left out.
    """
    video, frames = plan.segment_frames(segment)
    given_up = _given_up(video, frames, watch)
    coded: list[bytes] = []
    numbers: list[int] = []
    try:
        for number, frame in _decode(plan, video, frames, given_up, watch):
            coded.append(simplejpeg.encode_jpeg_yuv_planes(frame.y, frame.u, frame.v, plan.jpeg_quality))
            numbers.append(number)
    except (VideoError, OSError) as error:
        watch.begin(int(frames[min(len(numbers), len(frames) - 1)]))  # which ends this where nobody waits any more
        logger.warning("%s: decoding stops after %d of %d frames: %s", video.path, len(numbers), len(frames), error)
    sizes = np.array([len(picture) for picture in coded], np.int64)
    joined = np.frombuffer(b"".join(coded), np.uint8)
    return DecodedSegment(video.path, np.array(numbers, np.int64), sizes.cumsum(), joined, frames[given_up])


def _given_up(video: StreamedVideo, frames: NDArray[np.int64], watch: Watch) -> NDArray[np.bool_]:
    """Which of the frames are in the group of pictures of one that is given up."""
    keys = [video.index.key_before(pts) for pts in video.pts[frames].tolist()]
    bad = {key for key, frame in zip(keys, frames.tolist(), strict=True) if frame in watch.given_up}
    return np.array([key in bad for key in keys], np.bool_)


def _decode(
    plan: SegmentPlan, video: StreamedVideo, frames: NDArray[np.int64], given_up: NDArray[np.bool_], watch: Watch
) -> Iterator[tuple[int, DecodedFrame]]:
    """Kept-frame numbers and pictures, from every run of frames between two given-up groups of pictures."""
    number_of = {int(video.pts[frame]): int(frame) for frame in frames.tolist()}
    left_out = dict(zip(number_of, given_up.tolist(), strict=True))
    decoder = get_decoder(plan.decoder)
    for skipped, run in groupby(number_of, key=lambda pts: left_out[pts]):
        if skipped:
            continue
        wanted = list(run)
        watch.begin(number_of[wanted[0]])
        check_unchanged(video.path, video.index.size_bytes)
        for frame in decoder.decode(video.index, wanted, short_side=plan.short_side):
            yield number_of[frame.pts], frame
            following = bisect_right(wanted, frame.pts)
            if following < len(wanted):
                watch.begin(number_of[wanted[following]])
