"""The plan of direct streaming: which segments each slot decodes, and in which order it emits their clips.

A segment is a key-frame-aligned part of a video with every clip that starts in it. Epoch after epoch, all K segments
are permuted and laid end to end; slot s gets the positions s, s + S, s + 2 S ... of that endless line, so no slot's
stream is ever empty, however few segments there are. A slot takes G segments at a time, pools their clips, permutes the
pool and emits it, M clips a step: it is a pure function of (plan, step, slot), and whoever begins at any step decodes
the G segments of the pool at hand and nothing before them.

S slots a step, M clips a slot, G segments a pool, K segments, E places where a clip may start, F kept frames.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dora_ray.clips.plan import Clip, Plan, Purpose, epoch_order, slot_generator
from dora_ray.errors import VideoError
from dora_ray.video.decoders import get_decoder, scaled_size
from dora_ray.video.index import VideoIndex

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StreamedVideo:
    """A video whose kept frames are known from its index alone: no picture of it has been decoded.

    Attributes:
        index: of the file.
        pts: (F,) int64 ticks of the kept frames, ascending.
        times: (F,) float64 seconds from the video's first frame.
        width, height: of every kept frame after scaling, pixels.
    """

    index: VideoIndex
    pts: NDArray[np.int64]
    times: NDArray[np.float64]
    width: int
    height: int

    @property
    def video_id(self) -> str:
        """Name of the video by content."""
        return self.index.video_id

    @property
    def path(self) -> str:
        """The video file."""
        return self.index.path

    @property
    def digest(self) -> str:
        """Hash of the video's content."""
        return self.index.digest

    @property
    def cuts(self) -> NDArray[np.bool_]:
        """(F,) False: where shots begin is not known before decoding."""
        return np.zeros(len(self.pts), np.bool_)


def streamed_videos(
    indexes: Sequence[VideoIndex], *, decoder: str, frames_per_second: float, short_side: int
) -> list[StreamedVideo]:
    """The videos as direct streaming reads them, copies of one file counted once.

    Raises:
        VideoError: the decoder would be wrong on one of them.
        ConfigError: the decoder is not installed.
    """
    library = get_decoder(decoder)
    videos: dict[str, StreamedVideo] = {}
    for index in indexes:
        reason = library.refusal(index)
        if reason:
            raise VideoError(f"{index.path}: decoder {decoder} is refused: {reason}; use data.decoder=pyav")
        for warning in index.warnings:
            logger.warning("%s", warning)
        pts = index.pts[index.kept_frames(frames_per_second)]
        width, height = scaled_size(index.width, index.height, short_side)
        videos.setdefault(index.video_id, StreamedVideo(index, pts, index.seconds(pts), width, height))
    return list(videos.values())


@dataclass(frozen=True, kw_only=True)
class SegmentPlan(Plan):
    """The plan over videos that are decoded while the run trains.

    Attributes:
        segment_seconds: least length of a segment, rounded up to a key frame.
        shuffle_segments: G.
        crops_per_clip: how often an epoch emits each clip, every time cropped anew.
        decoder: "pyav", "decord" or "torchcodec".
        short_side: of a decoded frame, pixels.
        jpeg_quality: of a decoded frame while it waits in memory.
    """

    segment_seconds: float
    shuffle_segments: int
    crops_per_clip: int
    decoder: str
    short_side: int
    jpeg_quality: int

    @property
    def clips_per_epoch(self) -> int:
        """Clips that an epoch emits."""
        return len(self.starts) * self.crops_per_clip

    @cached_property
    def segments(self) -> NDArray[np.int64]:
        """(K, 3): video, first row and end row in `starts` of every segment that a clip starts in."""
        found = []
        for number, video in enumerate(self.videos):
            assert isinstance(video, StreamedVideo)
            first, last = np.searchsorted(self.starts[:, 0], [number, number + 1])
            begins = video.pts[self.starts[first:last, 1]]
            stops = [segment.stop_pts for segment in video.index.segments(self.segment_seconds)]
            edges = first + np.concatenate([[0], np.searchsorted(begins, stops)])
            found += [(number, low, high) for low, high in pairwise(edges.tolist()) if high > low]
        return np.array(found, np.int64).reshape(-1, 3)

    def segment_frames(self, segment: int) -> tuple[StreamedVideo, NDArray[np.int64]]:
        """The video of a segment, and the kept frames that its clips are made of, ascending."""
        number, first, last = self.segments[segment].tolist()
        video = self.videos[number]
        assert isinstance(video, StreamedVideo)
        return video, np.unique(self.starts[first:last, 1:]).astype(np.int64)

    def clip(self, number: int) -> Clip:
        """Clip number n of the run."""
        place, i = divmod(number, self.clips_per_slot)
        return self.slot_clips(*divmod(place, self.slots))[i]

    def slot_clips(self, step: int, slot: int) -> list[Clip]:
        """The M clips of a slot."""
        first = (step * self.slots + slot) * self.clips_per_slot
        rows: list[NDArray[np.int64]] = []
        for group, begin, end in self._spans(step, slot):
            rows.extend(self._pool(slot, group)[begin:end])
        clips = []
        for i, (segment, row) in enumerate(rows):
            video, *frames = self.starts[row].tolist()
            clips.append(Clip(first + i, video, tuple(frames), int(segment)))
        return clips

    def live_segments(self, step: int, slot: int) -> tuple[list[int], list[int]]:
        """Segments of the pools that a slot's step draws from, and those of the pool that follows."""
        groups = [group for group, _, _ in self._spans(step, slot)]
        now = [segment for group in groups for segment in self.group_segments(slot, group)]
        return now, self.group_segments(slot, groups[-1] + 1)

    def group_segments(self, slot: int, group: int) -> list[int]:
        """The G segments that a slot pools at a time; in a short video one may occur twice."""
        count = len(self.segments)
        places = [slot + self.slots * (group * self.shuffle_segments + i) for i in range(self.shuffle_segments)]
        return [int(epoch_order(self.seed, p // count, count, Purpose.SEGMENTS)[p % count]) for p in places]

    def _spans(self, step: int, slot: int) -> Iterator[tuple[int, int, int]]:
        """(group, begin, end): the parts of pools that make up a slot's step."""
        first, last = step * self.clips_per_slot, (step + 1) * self.clips_per_slot
        ends = self._group_ends(slot, last)
        group = bisect_right(ends, first)
        while first < last:
            start, end = (ends[group - 1] if group else 0), min(ends[group], last)
            yield group, first - start, end - start
            group, first = group + 1, end

    def _group_ends(self, slot: int, count: int) -> list[int]:
        """Clips that a slot has emitted at the end of each pool, at least up to `count`."""
        known: list[int] = self._ends.get(slot, [])
        if not known or known[-1] < count:
            # A new list: other threads may be reading the old one.
            known = list(known)
            sizes = (self.segments[:, 2] - self.segments[:, 1]) * self.crops_per_clip
            while not known or known[-1] < count:
                size = int(sizes[self.group_segments(slot, len(known))].sum())
                known.append(size + (known[-1] if known else 0))
            self._ends[slot] = known
        return known

    @cached_property
    def _ends(self) -> dict[int, list[int]]:
        return {}

    def _pool(self, slot: int, group: int) -> NDArray[np.int64]:
        """(P, 2): segment and row in `starts` of a pool's clips, in the order they are emitted.

        With several crops of a clip the pool is emitted that many times over, permuted anew, so that the crops of one
        clip are far apart.
        """
        parts = [(segment, *self.segments[segment, 1:].tolist()) for segment in self.group_segments(slot, group)]
        rows = np.concatenate([np.stack([np.full(high - low, n), np.arange(low, high)], 1) for n, low, high in parts])
        rng = slot_generator(self.seed, group, slot, Purpose.POOL)
        return np.concatenate([rows[rng.permutation(len(rows))] for _ in range(self.crops_per_clip)])
