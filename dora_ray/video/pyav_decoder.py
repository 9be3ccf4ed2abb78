"""FFmpeg through PyAV: the decoder that reads every file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from dora_ray.errors import VideoError
from dora_ray.video.bitstream import reference_test
from dora_ray.video.fields import FieldPairs
from dora_ray.video.frames import DecodedFrame, scaled_size, stored_plane
from dora_ray.video.index import VideoIndex
from dora_ray.video.orientation import upright
from dora_ray.video.scan import NO_TIME
from dora_ray.video.sources import open_container, video_stream

MAX_READ_ERRORS = 16
# For unspecified color matrices, players assume BT.709 from 720 lines on, BT.601 below.
HD_LINES = 720
UNSPECIFIED = 2
# Frames decoded past the last wanted one before missing frames are given up: decoders output frames in display order,
# which wrong timestamps do not follow.
FRAMES_BEHIND = 64
# FFmpeg takes the seam of concatenated files for damage, and marks a packet that ends there as corrupt.
JOIN_PACKETS = 3


class PyAVDecoder:
    """FFmpeg through PyAV: seeks to the segment's key frame, decodes on, and drops frames that damage may have reached.

    Non-reference pictures are decoded only if wanted (H.264 and AV1). That changes no pixel of the others, while
    FFmpeg's skip_frame=NONREF, which saves hardly more, would return a neighbor in place of a skipped frame.
    """

    name = "pyav"

    def refusal(self, index: VideoIndex) -> str | None:
        """Return None: PyAV refuses no indexed file."""
        return None

    def decode(self, index: VideoIndex, pts: Sequence[int], *, short_side: int) -> Iterator[DecodedFrame]:
        """See `Decoder.decode`."""
        wanted = {int(p) for p in pts}
        if not wanted:
            return
        scaler, last, behind = _Scaler(index, short_side), max(wanted), 0
        packets = _packets(index, index.key_before(min(wanted)))
        for frame in _frames(index, packets, frozenset(wanted)):
            time = _time(frame)
            if time in wanted:
                wanted.remove(time)
                yield scaler(frame)
            behind += time > last
            if not wanted or behind > FRAMES_BEHIND:
                return


def _time(frame: av.VideoFrame) -> int:
    """Return a frame's presentation time in ticks; `_sound_frames` leaves out frames without one."""
    assert frame.pts is not None
    return frame.pts


class _Scaler:
    """AREA downscale (antialiased, as fast as bilinear), with rotation, to JPEG's color matrix and range."""

    def __init__(self, index: VideoIndex, short_side: int) -> None:
        width, height = scaled_size(index.width, index.height, short_side)
        self._mirrored, self._rotation = index.mirrored, index.rotation
        self._size = (height, width) if index.rotation % 180 else (width, height)
        self._guess = Colorspace.ITU709 if index.coded_height >= HD_LINES else Colorspace.ITU601
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> DecodedFrame:
        picture = self._reformatter.reformat(
            frame,
            *self._size,
            format="yuvj420p",
            interpolation="AREA",
            src_colorspace=self._guess if frame.colorspace == UNSPECIFIED else None,
            dst_colorspace=Colorspace.ITU601,
            dst_color_range="JPEG",
            threads=1,
        )
        return DecodedFrame(_time(frame), *(self._upright(stored_plane(plane)) for plane in picture.planes))

    def _upright(self, plane: np.ndarray) -> np.ndarray:
        if not (self._mirrored or self._rotation):
            return plane
        return upright(plane, mirrored=self._mirrored, rotation=self._rotation)


def _frames(
    index: VideoIndex, packets: Iterator[av.Packet[av.VideoStream]], wanted: frozenset[int]
) -> Iterator[av.VideoFrame]:
    """Yield undamaged frames with their times, in display order."""
    keys = frozenset(index.key_pts.tolist())
    if index.timed:
        return _sound_frames(_needed(packets, wanted), keys, heals=dict(index.heals))
    return _in_order(index, _sound_frames(packets, keys, keep_order=True))


def _in_order(index: VideoIndex, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Replace decoding times by presentation times: from each start on, frames take the times of `pts` in order."""
    start, place = None, 0
    for frame in frames:
        key = index.key_before(_time(frame))
        if key != start:
            start, place = key, int(np.searchsorted(index.pts, key))
        frame.pts = int(index.pts[place])
        place += 1
        yield frame


def _packets(index: VideoIndex, key: int) -> Iterator[av.Packet[av.VideoStream]]:
    """Yield the packets from the start `key` to the end.

    Some containers seek by decoding time, to an approximate position, or not at all. If a seek lands too late, it is
    repeated two seconds earlier; then the file is read from its start.
    """
    from_start = len(index.packet_pts) or key <= index.key_pts[0]
    for start in (None,) if from_start else (key, key - round(2.0 / index.tick), None):
        found = False
        for packet in _packets_after(index, start):
            found = found or packet.pts == key
            if found:
                yield packet
            elif packet.is_keyframe and packet.pts is not None and packet.pts > key and start is not None:
                break
        if found:
            return
    raise VideoError(
        f"{index.path}: the key frame at {key} is gone, so the file changed after it was indexed; start again"
    )


def _packets_after(index: VideoIndex, start: int | None) -> Iterator[av.Packet[av.VideoStream]]:
    """Yield packets from a seek to `start` ticks, or from the beginning, with the times of the index.

    Skips a bounded number of unreadable places.
    """
    with open_container(index.path) as container:
        stream = video_stream(container, index.path)
        stream.thread_count = 1
        if start is not None:
            try:
                container.seek(start, stream=stream, backward=True)
            except av.FFmpegError:
                return
        timed = _Timed(index, stream)
        for _ in range(MAX_READ_ERRORS):
            try:
                yield from map(timed, container.demux(stream))
                return
            except av.FFmpegError:
                continue


class _Timed:
    """Assigns the index's times to packets; the second field of a frame gets the time of the first."""

    def __init__(self, index: VideoIndex, stream: av.VideoStream) -> None:
        self._index, self._number = index, 0
        self._last: int | None = None
        context = stream.codec_context
        self._pairs = FieldPairs(context.codec.canonical_name, context.extradata) if index.field_pairs else None

    def __call__(self, packet: av.Packet[av.VideoStream]) -> av.Packet[av.VideoStream]:
        if not packet.size:
            return packet
        if len(self._index.packet_pts):
            time = self._index.packet_pts[min(self._number, len(self._index.packet_pts) - 1)]
            packet.pts = None if time == NO_TIME else int(time)
        elif not self._index.timed:
            packet.pts = packet.dts
        if packet.is_corrupt and any(0 < join - self._number <= JOIN_PACKETS for join in self._index.joins):
            packet.is_corrupt = False
        if self._pairs and self._pairs.is_second(memoryview(packet)):
            packet.pts = self._last
        self._number, self._last = self._number + 1, packet.pts
        return packet


def _needed(
    packets: Iterator[av.Packet[av.VideoStream]], wanted: frozenset[int]
) -> Iterator[av.Packet[av.VideoStream]]:
    """Drop packets whose picture is neither wanted nor referenced by others; the final empty packet stays.

    Packets of one picture, which share a time, are kept or dropped together.
    """
    is_reference: Callable[[memoryview], bool] | None = None
    for pts, group in groupby(packets, key=lambda packet: packet.pts):
        picture = list(group)
        if is_reference is None:
            context = picture[0].stream.codec_context
            is_reference = reference_test(context.codec.canonical_name, context.extradata)
        if pts in wanted or any(not packet.size or is_reference(memoryview(packet)) for packet in picture):
            yield from picture


def _sound_frames(
    packets: Iterator[av.Packet[av.VideoStream]],
    keys: frozenset[int],
    *,
    heals: Mapping[int, int] | None = None,
    keep_order: bool = False,
) -> Iterator[av.VideoFrame]:
    """Yield frames in display order, without those that damage may have reached.

    Damage lasts until the next start; frames stored after that start but shown before it may still reference damaged
    pictures. The last packet is empty and flushes the decoder.

    Args:
        packets: packets from a start on.
        keys: times of starts.
        heals: {time of a picture: time of the first later frame that earlier damage does not reach}.
        keep_order: a lost frame makes the times of the following ones unknown, up to the next start.
    """
    suspects: set[int | None] = {None}
    waiting: set[int | None] = set()
    broken, tainted_before, last, whole_at = False, None, None, None
    for packet in packets:
        if packet.pts != last and (packet.pts in keys or (whole_at is not None and packet.pts == whole_at)):
            tainted_before, broken = (packet.pts if broken else None), False
        last = packet.pts
        if broken and heals and packet.pts is not None and packet.pts in heals:
            whole_at = heals[packet.pts]
        if packet.is_corrupt:
            broken, whole_at = True, None
        waiting.add(packet.pts)
        if broken or (tainted_before is not None and packet.pts is not None and packet.pts < tainted_before):
            suspects.add(packet.pts)
        try:
            frames = packet.decode()
        except av.FFmpegError:
            broken, whole_at = True, None
            suspects |= waiting if keep_order else {packet.pts}
            continue
        for frame in frames:
            waiting.discard(frame.pts)
            if frame.is_corrupt:
                broken, whole_at = True, None
                suspects |= waiting
            elif frame.pts not in suspects:
                yield frame
