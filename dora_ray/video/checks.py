"""Looks at a file, after the pass over its packets, that tell whether its times can be believed.

An ordinary file pays for some packets that are read at three places, and for no picture.
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

# Containers in whose files each picture has the time at which it is shown, or none.
TIMED_CONTAINERS = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "avi", "flv"))
# Program streams have a time here and there; the others' depend on where reading began.
READ_FROM_THE_START = frozenset(("mpeg",))
SAMPLE_PACKETS, SAMPLE_PICTURES = 300, 100
SEAM_PLACES, SEAM_PACKETS, SEARCHED_PACKETS = 3, 40, 2000


def times_contradict(codec: Codec, packets: Scan) -> bool:
    """Return whether no decoder's order allows the times of presentation, though those of decoding go forward."""
    counted = ~packets.column("second") & ~packets.column("hidden")
    pts, dts = packets.column("pts")[counted], packets.column("dts")[counted]
    if len(pts) < 2 or (pts == NO_TIME).any() or (dts == NO_TIME).any() or (np.diff(dts) <= 0).any():
        return False
    if not codec.reorder:
        return bool((np.diff(pts) < 0).any())
    # But for a delay that all have, a picture is shown before those that are decoded long after it.
    pts = pts - (pts - dts).min()
    step = int(np.median(np.diff(dts)))
    latest = np.concatenate([dts, dts[-1] + step * np.arange(1, REORDER_PACKETS + 1)])[REORDER_PACKETS:]
    return bool((pts > latest).any())


def times_are_of_decoding(path: str, container: InputContainer, stream: VideoStream, packets: Scan) -> bool:
    """Return whether pictures come out of the decoder in another order than that of their times.

    Asked only of files where that may be: pictures are reordered, and times ascend in the order of the file; or the
    container is one that does not hold the times of single pictures.
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
    """Times of the first pictures, in the order in which the decoder gives them."""
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
    """Return whether packets have the same times after a seek as when the file is read from its start."""
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
    """Compare what follows a seek to packet `place` with what the pass found there."""
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
