"""Warnings about a video file: lost parts, unusual properties, and how they are handled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from av.video.stream import VideoStream

from dora_ray.video.orientation import Orientation
from dora_ray.video.scan import Scan
from dora_ray.video.timeline import Timeline

LOST_SECONDS = 1.0
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}


def remarks(
    path: str,
    streams: Sequence[VideoStream],
    chosen: VideoStream,
    packets: Scan,
    times: Timeline,
    shown: Orientation,
    *,
    declared_seconds: float,
    real_seconds: float,
) -> tuple[str, ...]:
    """Return what users should know about the file, one sentence each, prefixed with its path."""
    found = [
        *_of_streams(streams, chosen),
        *_of_the_end(packets, declared_seconds, real_seconds),
        *_of_times(times, float(chosen.time_base or 0)),
        *_of_pictures(chosen, shown),
    ]
    return tuple(f"{path}: {remark}" for remark in found)


def _of_streams(streams: Sequence[VideoStream], chosen: VideoStream) -> Iterator[str]:
    if len(streams) > 1:
        listed = ", ".join(f"{s.index}: {s.codec_context.width}x{s.codec_context.height}" for s in streams)
        yield f"holds {len(streams)} video streams ({listed}); stream {chosen.index} is used"


def _of_the_end(packets: Scan, declared: float, real: float) -> Iterator[str]:
    if declared - real > LOST_SECONDS:
        yield (
            f"its header declares {declared:.1f} s, but the file holds {real:.1f} s: the end is lost"
            " (a broken download?); the remaining part is used"
        )
    if packets.broken:
        yield f"reading stopped at {real:.1f} s ({packets.broken}); the part before is used"


def _of_times(times: Timeline, tick: float) -> Iterator[str]:
    if times.lost_start:
        yield f"the first {times.lost_start} frames come before the first key frame and cannot be decoded"
    if not times.timed:
        yield "its presentation times are missing or wrong; frames are used in decoder order, at their decoding times"
    if times.joins:
        yield (
            f"its clock goes back {len(times.joins)} times (concatenated files?); each part follows the one before it"
        )
    if times.holes:
        place, length = times.holes[0]
        more = f", and {len(times.holes) - 1} more times" if len(times.holes) > 1 else ""
        yield f"its clock jumps by {length:.0f} s at {place:.1f} s{more}; the times are used unchanged"
    if times.without_time:
        yield f"{times.without_time} frames have no timestamp and are left out"
    if times.doubled:
        yield f"{times.doubled} frames share the timestamp of another frame and are left out"


def _of_pictures(stream: VideoStream, shown: Orientation) -> Iterator[str]:
    context = stream.codec_context
    name = HDR_TRANSFERS.get(int(context.color_trc))
    if name:
        yield f"high dynamic range ({name}, {context.pix_fmt}) is not tone-mapped; colors will look flat"
    if not shown.exact:
        turned = f"{shown.rotation} degrees" + (", mirrored" if shown.mirrored else "")
        yield f"its rotation is not a multiple of 90 degrees; the nearest is used ({turned})"
