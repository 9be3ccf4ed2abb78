"""Work of an ingest: the segments whose frames a store lacks, and the task that decodes one.

A task that hangs is killed with its process; if it hangs twice, the segment's frames count as unreadable.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from dora_ray import files
from dora_ray.errors import DoRAError, VideoError
from dora_ray.store import datasets, indexes
from dora_ray.store import frames as frame_store
from dora_ray.store.frames import FrameFormat
from dora_ray.store.hangs import TaskWatch
from dora_ray.store.shield import DECODE_BYTES, memory_limit
from dora_ray.video.decoders import DecodedFrame, get_decoder, scaled_size
from dora_ray.video.index import VideoIndex
from dora_ray.video.sources import check_unchanged

# Rows held in memory by a task: a file whose only key frame is its first is one segment, however long.
ROWS_A_FILE = 256
# Length of video that a task's time limit covers; a shorter segment gets the whole limit.
LIMIT_VIDEO_SECONDS = 10.0


@dataclass(frozen=True)
class Work:
    """Frames of one segment that are not stored yet.

    Attributes:
        path: the video file.
        video_id: its identifier, derived from the content.
        uri: its dataset.
        segment: number of the segment.
        pts: ticks of the frames.
        size_bytes: size of the video file.
        seconds: time of the first of these frames from the video's start.
        limit_seconds: time limit of decoding them.
    """

    path: str
    video_id: str
    uri: str
    segment: int
    pts: list[int]
    size_bytes: int
    seconds: float
    limit_seconds: float

    @property
    def name(self) -> str:
        """Description for messages."""
        return f"{self.path}, {self.seconds:.1f} s from its start"


def find_work(
    indexes: Sequence[VideoIndex], *, store: str, form: FrameFormat, segment_seconds: float, decode_seconds: float
) -> list[Work]:
    """Return the segments whose frames the store lacks; see `ingest`."""
    return [
        part
        for index in indexes
        for part in _pending(
            index, frame_store.dataset_uri(store, index.video_id, form), form, segment_seconds, decode_seconds
        )
    ]


def ingest_segment(item: str, *, store: str, decoder: str, form: FrameFormat) -> dict[str, Any]:
    """Decode one segment's frames in a Ray task and write them; return what the driver needs to commit them."""
    part = Work(**json.loads(item))
    result = {"uri": part.uri, "fragments": "[]", "frames": 0, "missing": 0, "error": "", "hung": ""}
    with TaskWatch(part.limit_seconds) as watch:
        unread = 0 in watch.given_up
        if unread and not watch.hung:
            result["error"] = (
                f"{part.name}: its decode process dies repeatedly; look for the cause in Ray's logs"
                " (memory?), or leave the file out"
            )
            return result
        watch.begin(0)
        try:
            with memory_limit():
                fragments, missing = _write_segment(part, store, None if unread else decoder, form)
        except DoRAError as error:
            result["error"] = str(error)
        except MemoryError:
            result["error"] = (
                f"{part.name}: decoding asked for more than {DECODE_BYTES / 2**30:.0f} GiB, more than any"
                " ordinary film needs; leave the file out"
            )
        else:
            result |= {"fragments": json.dumps(fragments), "frames": len(part.pts), "missing": missing}
            result["hung"] = f"{part.name}: decoding did not end in {part.limit_seconds:.0f} s" if unread else ""
    return result


def _pending(
    index: VideoIndex, uri: str, form: FrameFormat, segment_seconds: float, decode_seconds: float
) -> list[Work]:
    lacking = frame_store.unstored_frames(index, uri, form)
    parts = []
    for segment in index.segments(segment_seconds) if len(lacking) else ():
        first, last = np.searchsorted(lacking, [segment.start_pts, segment.stop_pts])
        pts = lacking[first:last].tolist()
        if pts:
            length = index.playing_seconds(index.key_before(pts[0]), pts[-1])
            limit = decode_seconds * max(1.0, length / LIMIT_VIDEO_SECONDS)
            start = float(index.seconds(np.array(pts[0])))
            size = index.size_bytes
            parts.append(Work(index.path, index.video_id, uri, segment.number, pts, size, start, limit))
    return parts


def _write_segment(part: Work, store: str, decoder: str | None, form: FrameFormat) -> tuple[list[str], int]:
    """Return the written data files and the number of missing frames; without a decoder, all are missing."""
    index = replace(_worker_index(store, part.video_id), path=part.path)
    frames: Iterable[DecodedFrame] = ()
    if decoder:
        check_unchanged(part.path, part.size_bytes)
        frames = get_decoder(decoder).decode(index, part.pts, short_side=form.short_side)
    width, height = scaled_size(index.width, index.height, form.short_side)
    lost = set(part.pts)

    def rows() -> Iterator[dict[str, object]]:
        for frame in frames:
            lost.discard(frame.pts)
            yield datasets.frame_row(frame, segment=part.segment, jpeg_quality=form.jpeg_quality)
        for pts in sorted(lost):
            yield datasets.missing_row(pts, segment=part.segment, width=width, height=height)

    fragments: list[str] = []
    remaining = rows()
    try:
        while batch := list(islice(remaining, ROWS_A_FILE)):
            fragments += datasets.write_rows(part.uri, batch)
    except BaseException:
        datasets.discard(part.uri, fragments)
        raise
    return fragments, len(lost)


@functools.lru_cache(maxsize=8)
def _worker_index(store: str, video_id: str) -> VideoIndex:
    index = indexes.stored_index(store, video_id)
    if index is None:
        raise VideoError(
            f"{files.join(store, video_id)}: has no index on this node; the store must be reachable from every node"
        )
    return index
