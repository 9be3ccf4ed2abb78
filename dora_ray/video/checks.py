"""Checks, after the scan of a file's packets, of whether its timestamps can be trusted.

An ordinary file costs a few packets read at three places, and no decoding.
"""

from __future__ import annotations

from itertools import pairwise

import av
import numpy as np
from av.codec import Codec
from av.container import InputContainer
from av.video.stream import VideoStream

from dora_ray.video.scan import NO_TIME, Scan
from dora_ray.video.sources import open_container, video_stream
from dora_ray.video.timeline import REORDER_PACKETS

# Containers whose files store a presentation time for each picture, or none at all.
TIMED_CONTAINERS = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "avi", "flv"))
# Program streams have only occasional timestamps; FFmpeg derives the others from where reading began.
READ_FROM_THE_START = frozenset(("mpeg",))
SAMPLE_PACKETS, SAMPLE_PICTURES = 300, 100
SEAM_PLACES, SEAM_PACKETS, SEARCHED_PACKETS = 3, 40, 2000


def times_contradict(codec: Codec, packets: Scan) -> bool:
    """Return whether no decoding order allows the presentation times, although decoding times ascend."""
    counted = ~packets.column("second") & ~packets.column("hidden")
    pts, dts = packets.column("pts")[counted], packets.column("dts")[counted]
    if len(pts) < 2 or (pts == NO_TIME).any() or (dts == NO_TIME).any() or (np.diff(dts) <= 0).any():
        return False
    if not codec.reorder:
        return bool((np.diff(pts) < 0).any())
    # Apart from a delay common to all, a picture is shown before those that are decoded long after it.
    pts = pts - (pts - dts).min()
    step = int(np.median(np.diff(dts)))
    latest = np.concatenate([dts, dts[-1] + step * np.arange(1, REORDER_PACKETS + 1)])[REORDER_PACKETS:]
    return bool((pts > latest).any())


def times_are_of_decoding(path: str, container: InputContainer, stream: VideoStream, packets: Scan) -> bool:
    """Return whether the decoder outputs pictures in another order than that of their timestamps.

    Only checked where this can happen: pictures are reordered although timestamps ascend in file order, or the
    container does not store a timestamp for every picture.
    """
    context = stream.codec_context
    times = packets.column("pts")
    times = times[(times != NO_TIME) & ~packets.column("second") & ~packets.column("hidden")]
    ascending = bool((np.diff(times) >= 0).all())
    trusted = container.format.name in TIMED_CONTAINERS
    if not context.codec.reorder or (trusted and not (ascending and context.has_b_frames)):
        return False
    return any(later < earlier for earlier, later in pairwise(_shown_times(path)))


def _shown_times(path: str) -> list[int]:
    """Return the timestamps of the first pictures, in the decoder's output order."""
    found: list[int] = []
    with open_container(path) as container:
        stream = video_stream(container, path)
        try:
            for number, packet in enumerate(container.demux(stream)):
                found += [frame.pts for frame in packet.decode() if frame.pts is not None]
                if number >= SAMPLE_PACKETS or len(found) >= SAMPLE_PICTURES:
                    break
        except av.FFmpegError:
            pass
    return found


def times_follow_seeks(path: str, packets: Scan, *, timed: bool) -> bool:
    """Return whether packets have the same timestamps after a seek as when the file is read from its start."""
    stamp = "pts" if timed else "dts"
    times = packets.column(stamp)
    starts = np.flatnonzero((packets.column("starts") > 0) & (times != NO_TIME))[1:]
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, SEAM_PLACES).astype(int))] if len(starts) else starts
    with open_container(path) as container:
        if container.format.name in READ_FROM_THE_START:
            return False
        stream = video_stream(container, path)
        return all(_agrees(container, stream, packets, times, int(place), stamp) for place in chosen)


def _agrees(
    container: InputContainer, stream: VideoStream, packets: Scan, times: np.ndarray, place: int, stamp: str
) -> bool:
    """Compare the packets after a seek to packet `place` with those found by the scan."""
    number = None
    try:
        container.seek(int(times[place]), stream=stream, backward=True)
        for searched, packet in enumerate(container.demux(stream)):
            time = getattr(packet, stamp)
            if number is None and time == times[place]:
                number = place
            if number is None and packet.size and searched < SEARCHED_PACKETS:
                continue
            if number is None or not packet.size or number >= min(place + SEAM_PACKETS, len(times)):
                return True  # a decoder that does not find the start here reads the file from its beginning
            if (NO_TIME if time is None else time, packet.size) != (times[number], packets.sizes[number]):
                return False
            number += 1
    except av.FFmpegError:
        pass
    return True
