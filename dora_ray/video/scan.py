"""Scan of a file's packets in one pass: times, sizes, marks, and random access points. Only one picture is decoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from dora_ray.video.bitstream import sequence_parameters
from dora_ray.video.fields import FieldPairs
from dora_ray.video.keyframes import BrokenLinks, Start, recovery_wait, start_test

# Packets decoded until the first picture comes out, which shows the true size and orientation.
PICTURE_PACKETS = 64
NO_TIME = np.iinfo(np.int64).min


@dataclass
class Scan:
    """Packets of a file in file order, one list entry each.

    Attributes:
        pts, dts: ticks; NO_TIME if absent.
        marked: the container, or FFmpeg's parser, marks it as a key frame.
        hidden: an edit list hides it.
        starts: random access at this packet.
        second: it completes the previous packet's frame.
        skipped: it is never shown, because a picture that it references is missing.
        waits: frames from a marked packet to the first complete one.
        heads: hash of the beginnings of marked packets.
        parameters: sequence parameter sets of marked packets.
        broken: FFmpeg's reason why reading ended early.
        picture: the first picture that could be decoded.
    """

    pts: list[int] = field(default_factory=list)
    dts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    marked: list[bool] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    second: list[bool] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    waits: dict[int, int] = field(default_factory=dict)
    heads: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    parameters: set[frozenset[bytes]] = field(default_factory=set)
    last_duration: int = 0
    broken: str = ""
    picture: av.VideoFrame | None = None

    def column(self, name: str) -> NDArray[Any]:
        """Return a list as an array."""
        kinds = {"pts": np.int64, "dts": np.int64, "sizes": np.int64, "starts": np.int8}
        return np.array(getattr(self, name), kinds.get(name, np.bool_))

    def digest(self, *facts: str) -> str:
        """Hash the packets' times, sizes and marks, the beginnings of marked packets, and the given facts."""
        state = self.heads.copy()
        for fact in facts:
            state.update(fact.encode())
        timed = self.column("pts") != NO_TIME
        if not timed.any():
            timed[:], times = True, self.column("dts")
        else:
            times = self.column("pts")
        for column, kind in (
            (times, "<i8"),
            (self.column("sizes"), "<i8"),
            (self.column("marked"), "u1"),
            (self.column("hidden"), "u1"),
        ):
            state.update(column[timed].astype(kind).tobytes())
        return str(state.hexdigest())


def scan(container: InputContainer, stream: VideoStream) -> Scan:
    """Read every packet of the stream."""
    found = Scan()
    context = stream.codec_context
    codec, extradata = context.codec.canonical_name, context.extradata
    start = start_test(codec, extradata, intra_only=context.codec.intra_only)
    pairs, links = FieldPairs(codec, extradata), BrokenLinks(codec, extradata)
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            content = memoryview(packet)
            second = pairs.is_second(content)
            found.pts.append(NO_TIME if packet.pts is None else packet.pts)
            found.dts.append(NO_TIME if packet.dts is None else packet.dts)
            found.sizes.append(packet.size)
            found.marked.append(packet.is_keyframe)
            found.hidden.append(packet.is_discard)
            found.starts.append(Start.NO if second else start(content, packet.is_keyframe))
            found.second.append(second)
            found.skipped.append(links.skips(content))
            found.last_duration = packet.duration or found.last_duration
            if packet.is_keyframe and packet.pts is not None:
                found.heads.update(content[:1024])
                found.parameters.add(sequence_parameters(content[:1024], codec, extradata))
            if packet.is_keyframe and not found.starts[-1]:
                found.waits[len(found.pts) - 1] = recovery_wait(content, codec, extradata)
            if found.picture is None and len(found.pts) <= PICTURE_PACKETS:
                found.picture = _first_picture(packet)
    except av.FFmpegError as error:
        found.broken = error.strerror or str(error)
    return found


def _first_picture(packet: av.Packet[av.VideoStream]) -> av.VideoFrame | None:
    """Decode a packet. Errors are ignored here; they show again at ingest."""
    try:
        return next(iter(packet.decode()), None)
    except av.FFmpegError:
        return None
