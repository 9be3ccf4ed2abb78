"""The index of what is in a video file.

Frames are named by their presentation time (pts, an integer in units of the stream's time base), never by
number / rate: rates are averages, and the frame counts in headers are missing or wrong in cut, truncated and streamed
files.

F frames of the file, G key frames.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.video.bitstream import sequence_parameters
from dora_ray.video.sources import file_stamp, find_videos, open_container, video_stream

__all__ = ["Segment", "VideoIndex", "find_videos", "index_video"]

INDEX_FORMAT = 2
LOST_SECONDS = 1.0
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}


@dataclass(frozen=True)
class Segment:
    """Frames with start_pts <= pts < stop_pts of one video; start_pts is a key frame's."""

    number: int
    start_pts: int
    stop_pts: int


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """What one pass over a file's packets tells, without decoding more than its first picture.

    Attributes:
        digest: hash of the times, sizes, key flags and the first bytes of the key frames: two files with one digest
            hold one video.
        time_base: numerator and denominator of a tick, seconds.
        pts: (F,) int64 ascending, ticks: every frame that can be shown.
        key_pts: (G,) int64 ascending, ticks: frames that decoding can start at.
        width, height: as displayed, after rotation and non-square pixels; coded_width, coded_height: as stored.
        rotation: degrees counterclockwise from the stored picture to the displayed one: 0, 90, 180 or 270.
        leading_frames: some frames are stored after a key frame and shown before it (open groups of pictures, mostly).
        discarded: packets that the container's edit list hides.
        declared_seconds: what the header promises, 0 where it says nothing; real_seconds: what the packets hold.
        resized: the parameters of the pictures, such as their size, change within the file (told for H.264).
        warnings: sentences for people: a file that lost its end, a high-dynamic-range transfer.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    digest: str
    container: str
    codec: str
    pixel_format: str
    time_base: tuple[int, int]
    pts: np.ndarray
    key_pts: np.ndarray
    width: int
    height: int
    coded_width: int
    coded_height: int
    rotation: int
    color_range: int
    color_space: int
    average_rate: float
    declared_seconds: float
    real_seconds: float
    leading_frames: bool
    discarded: int
    resized: bool
    warnings: tuple[str, ...]

    @property
    def tick(self) -> float:
        """Seconds of one pts unit."""
        return self.time_base[0] / self.time_base[1]

    @property
    def times(self) -> np.ndarray:
        """(F,) float64 seconds from the first frame."""
        return self.seconds(self.pts)

    @property
    def video_id(self) -> str:
        """Name of the video's folder in a frame store."""
        return f"{self.name_of(self.path)}-{self.digest[:8]}"

    @staticmethod
    def name_of(path: str) -> str:
        """The readable part of a video's name in a store; without what an address carries after a question mark."""
        place = path.partition("?")[0] if "://" in path else path
        return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(place).stem)[:80]

    def seconds(self, pts: np.ndarray) -> np.ndarray:
        """Seconds from the first frame, float64, of the given ticks."""
        return (np.asarray(pts, np.int64) - self.pts[0]) * self.time_base[0] / self.time_base[1]

    def kept_frames(self, frames_per_second: float) -> np.ndarray:
        """Positions in `pts` of the frames on screen at 0, 1/r, 2/r ... seconds, each once, ascending.

        Containers round times to their tick (1 ms in Matroska), so a frame counts as shown half a tick, at most 1 ms,
        early.
        """
        times = self.times
        slack = min(self.tick / 2, 1e-3) + 1e-9
        num_points = int(np.floor((times[-1] + slack) * frames_per_second)) + 1
        grid = np.arange(num_points) / frames_per_second
        return np.unique(np.searchsorted(times, grid + slack, side="right") - 1)

    def segments(self, seconds: float) -> list[Segment]:
        """The video cut at key frames into parts of at least `seconds` each (the last may be shorter)."""
        starts = [int(self.key_pts[0])]
        for key in self.key_pts[1:].tolist():
            if (key - starts[-1]) * self.tick >= seconds:
                starts.append(key)
        stops = [*starts[1:], int(self.pts[-1]) + 1]
        return [Segment(n, start, stop) for n, (start, stop) in enumerate(zip(starts, stops, strict=True))]

    def key_before(self, pts: int) -> int:
        """The last key frame at or before `pts`, ticks."""
        return int(self.key_pts[max(0, np.searchsorted(self.key_pts, pts, side="right") - 1)])

    def to_bytes(self) -> bytes:
        """The index as a NumPy .npz file; times as differences, which compress to a few bytes a second."""
        record = {k: v for k, v in asdict(self).items() if k not in ("pts", "key_pts")}
        text = json.dumps({"format": INDEX_FORMAT, **record})
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            record=np.frombuffer(text.encode(), np.uint8),
            pts=np.diff(self.pts, prepend=0),
            key_pts=np.diff(self.key_pts, prepend=0),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> VideoIndex:
        """Undo `to_bytes`. Raises ValueError for bytes of another kind or format."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                record = json.loads(archive["record"].tobytes())
                pts, key_pts = archive["pts"].cumsum(), archive["key_pts"].cumsum()
        except (OSError, KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a video index: {error}") from error
        if record.pop("format") != INDEX_FORMAT:
            raise ValueError("a video index of another format")
        record["time_base"] = tuple(record["time_base"])
        record["warnings"] = tuple(record["warnings"])
        return cls(pts=pts, key_pts=key_pts, **record)


def index_video(path: str) -> VideoIndex:
    """Index a file in one pass over its packets.

    Raises:
        VideoError: the file cannot be read as a video of two frames or more; the message says why and what to do.
    """
    path = files.absolute(path)
    with open_container(path) as container:
        stream = video_stream(container, path)
        scan = _scan(container, stream)
        return _build_index(path, container, stream, scan)


@dataclass
class _Scan:
    """What the pass collects, in the order of the file."""

    pts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keys: list[bool] = field(default_factory=list)
    heads: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    hidden: list[bool] = field(default_factory=list)
    parameters: set[frozenset[bytes]] = field(default_factory=set)
    without_time: int = 0
    last_duration: int = 0
    broken: str = ""
    picture: av.VideoFrame | None = None


def _scan(container: InputContainer, stream: VideoStream) -> _Scan:
    scan = _Scan()
    context = stream.codec_context
    codec, extradata = context.codec.canonical_name, context.extradata
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.pts is None:
                scan.without_time += 1
                continue
            scan.pts.append(packet.pts)
            scan.sizes.append(packet.size)
            scan.keys.append(packet.is_keyframe)
            scan.hidden.append(packet.is_discard)
            scan.last_duration = packet.duration or scan.last_duration
            if packet.is_keyframe:
                scan.heads.update(memoryview(packet)[:1024])
                scan.parameters.add(sequence_parameters(memoryview(packet)[:1024], codec, extradata))
            if scan.picture is None and len(scan.pts) <= 64:
                scan.picture = _first_picture(packet)
    except av.FFmpegError as error:
        scan.broken = error.strerror
    return scan


def _first_picture(packet: av.Packet) -> av.VideoFrame | None:
    """The rotation and the true size are only certain on a decoded picture; damage here shows again at ingest."""
    try:
        return next(iter(packet.decode()), None)
    except av.FFmpegError:
        return None


def _build_index(path: str, container: InputContainer, stream: VideoStream, scan: _Scan) -> VideoIndex:
    pts, key_pts, leading = _timeline(path, scan)
    base = stream.time_base or Fraction(1, 90000)
    real = float((int(pts[-1]) - int(pts[0]) + _last_duration(pts, scan)) * base)
    declared = _declared_seconds(container, stream)
    context, picture = stream.codec_context, scan.picture
    coded = (picture.width, picture.height) if picture else (context.width, context.height)
    rotation = round((picture.rotation if picture else 0) / 90) * 90 % 360
    width, height = _displayed(coded, stream.sample_aspect_ratio, rotation)
    size_bytes, mtime_ns = file_stamp(path)
    return VideoIndex(
        path=path,
        size_bytes=size_bytes,
        mtime_ns=mtime_ns,
        digest=_digest(scan, stream, (width, height, rotation)),
        container=container.format.name,
        codec=context.codec.canonical_name,
        pixel_format=str(context.pix_fmt),
        time_base=(base.numerator, base.denominator),
        pts=pts,
        key_pts=key_pts,
        width=width,
        height=height,
        coded_width=coded[0],
        coded_height=coded[1],
        rotation=rotation,
        color_range=int(context.color_range),
        color_space=int(context.colorspace),
        average_rate=float(stream.average_rate or 0) or (len(pts) / real if real else 0.0),
        declared_seconds=declared,
        real_seconds=real,
        leading_frames=leading,
        discarded=sum(scan.hidden),
        resized=len(scan.parameters - {frozenset()}) > 1,
        warnings=_warnings(path, scan, declared, real, int(context.color_trc), str(context.pix_fmt)),
    )


def _timeline(path: str, scan: _Scan) -> tuple[np.ndarray, np.ndarray, bool]:
    """(F,) and (G,) ascending times, and whether some frames are stored after a key frame and shown before it."""
    if not scan.pts and scan.without_time:
        raise VideoError(
            f"{path}: its frames carry no presentation times; copy it into Matroska: ffmpeg -i IN -c copy OUT.mkv"
        )
    order, keys = np.array(scan.pts, np.int64), np.array(scan.keys, bool)
    if not keys.any():
        detail = f" ({scan.broken})" if scan.broken else ""
        raise VideoError(
            f"{path}: no key frame among {len(order)} packets{detail}, so it cannot be decoded; get the file again"
        )
    hidden = np.array(scan.hidden, bool)
    if (np.diff(order[keys & ~hidden]) < 0).any():
        raise VideoError(
            f"{path}: its times go back in the middle (files joined byte by byte?), so its frames have no order; join"
            " the parts anew: ffmpeg -f concat -i LIST.txt -c copy OUT.mkv"
        )
    key_pts = np.unique(order[keys])
    latest_key = np.maximum.accumulate(np.where(keys, order, np.iinfo(np.int64).min))
    # A frame that an edit list hides is not shown, and may still be the key frame that others are decoded from.
    pts = np.unique(order[~hidden & (order >= key_pts[0])])
    if len(pts) < 2:
        raise VideoError(f"{path}: has {len(pts)} frame; a video needs at least 2")
    return pts, key_pts, bool(np.any((order < latest_key) & (order >= key_pts[0])))


def _last_duration(pts: np.ndarray, scan: _Scan) -> int:
    return scan.last_duration or int(np.median(np.diff(pts)))


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float:
    """The video stream's own length where the container has it: sound may be longer than the pictures."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")
    if len(parts) == 3:
        return float(parts[0]) * 3600 + float(parts[1]) * 60 + float(parts[2])
    return float(container.duration or 0) / av.time_base


def _displayed(coded: tuple[int, int], pixel_aspect: Fraction | None, rotation: int) -> tuple[int, int]:
    width, height = coded
    if pixel_aspect and pixel_aspect != 1:
        width = max(2, round(width * pixel_aspect))
    return (height, width) if rotation % 180 else (width, height)


def _digest(scan: _Scan, stream: VideoStream, shown: tuple[int, int, int]) -> str:
    """Of times, sizes, the beginnings of key frames, and how the pictures are shown: width, height, rotation."""
    context = stream.codec_context
    state = scan.heads.copy()
    state.update(f"{context.name} {context.width}x{context.height} {stream.time_base}".encode())
    if shown != (context.width, context.height, 0):
        state.update(" {}x{} {}".format(*shown).encode())
    for column, kind in ((scan.pts, "<i8"), (scan.sizes, "<i8"), (scan.keys, "u1"), (scan.hidden, "u1")):
        state.update(np.array(column, kind).tobytes())
    return str(state.hexdigest())


def _warnings(
    path: str, scan: _Scan, declared: float, real: float, transfer: int, pixel_format: str
) -> tuple[str, ...]:
    found = []
    if declared - real > LOST_SECONDS:
        found.append(
            f"{path}: its header promises {declared:.1f} s, {real:.1f} s are there: the end is lost"
            " (a broken download?); what is there is used"
        )
    if scan.broken:
        found.append(f"{path}: reading stopped at {real:.1f} s ({scan.broken}); what comes before is used")
    if transfer in HDR_TRANSFERS:
        name = HDR_TRANSFERS[transfer]
        found.append(f"{path}: high dynamic range ({name}, {pixel_format}) is not tone-mapped; colors will look flat")
    return tuple(found)
