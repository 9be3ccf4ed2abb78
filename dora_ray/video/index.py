"""Index of the frames in a video file.

Frames are identified by presentation time (pts, an integer in units of the stream's time base), never by number / rate:
rates are averages, and the frame counts in headers are missing or wrong in cut, truncated and streamed files.

F frames of the file, G key frames.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from dora_ray import files
from dora_ray.video.checks import times_are_of_decoding, times_contradict, times_follow_seeks
from dora_ray.video.orientation import Orientation, orientation
from dora_ray.video.remarks import remarks
from dora_ray.video.scan import Scan, scan
from dora_ray.video.sources import file_stamp, film_streams, find_videos, open_container, video_stream
from dora_ray.video.timeline import Timeline, timeline

__all__ = ["Segment", "VideoIndex", "find_videos", "index_video"]

INDEX_FORMAT = 3
ARRAYS = ("pts", "key_pts", "packet_pts")
# 1: trusted the container's key-frame marks, read the first video stream, expected one packet with its own time per
# frame, and ignored mirroring. 2: fixes all of these.
DECODING_RULES = 2
# Most parts of a file in which each part has to be read from the start of the file.
PARTS_READ_FROM_THE_START = 16


@dataclass(frozen=True)
class Segment:
    """Frames of one video with start_pts <= pts < stop_pts; start_pts belongs to a key frame."""

    number: int
    start_pts: int
    stop_pts: int


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Index of a file: one pass over its packets that decodes only the first picture.

    Attributes:
        digest: hash of the times, sizes, key flags and first bytes of key frames; equal digests mean equal
            videos.
        time_base: numerator and denominator of a tick, seconds.
        pts: (F,) int64 ascending, ticks: every frame that can be shown.
        key_pts: (G,) int64 ascending, ticks: frames at which decoding can start.
        width, height: as displayed, after rotation and non-square pixels; coded_width, coded_height: as stored.
        rotation: degrees counterclockwise from the stored picture to the displayed one: 0, 90, 180 or 270.
        mirrored: the stored picture is mirrored left to right before it is rotated.
        leading_frames: some frames are stored after a key frame but shown before it (mostly open groups of pictures).
        timed: False if packets carry decoding times only (H.264 in AVI): the frames decoded from a start on then have
            the times of `pts`, in that order.
        joins: numbers of the packets at which the file's clock goes back (mostly concatenated files).
        heals: (time of a picture, time of the first later frame that earlier damage does not reach), ticks, in streams
            with periodic intra refresh.
        packet_pts: (N,) int64, ticks: corrected times of all packets, if the file's clock goes back or times are
            missing; such a file is read from its start. Empty for all other files.
        field_pairs: some frames are coded as two fields in two packets.
        false_marks: packets marked as key frames at which decoding cannot start.
        holes: gaps so long that they are clock jumps rather than pauses.
        streams: video streams of the file, without cover pictures.
        discarded: packets hidden by the container's edit list.
        declared_seconds: length according to the header, 0 if absent; real_seconds: length of the packets found.
        resized: picture parameters, such as the size, change within the file (detected for H.264).
        rules: the oldest DECODING_RULES that decode all frames of the file correctly.
        warnings: sentences for users: a file that lost its end, a high-dynamic-range transfer function.
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
    mirrored: bool
    color_range: int
    color_space: int
    average_rate: float
    declared_seconds: float
    real_seconds: float
    leading_frames: bool
    timed: bool
    joins: tuple[int, ...]
    heals: tuple[tuple[int, int], ...]
    packet_pts: np.ndarray
    field_pairs: bool
    false_marks: int
    holes: int
    streams: int
    discarded: int
    resized: bool
    rules: int
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
        """Return the readable part of a video's name in a store, without the query string of a URL."""
        place = path.partition("?")[0] if "://" in path else path
        return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(place).stem)[:80]

    def seconds(self, pts: np.ndarray) -> np.ndarray:
        """Return float64 seconds from the first frame of the given ticks."""
        seconds: np.ndarray = (np.asarray(pts, np.int64) - self.pts[0]) * self.time_base[0] / self.time_base[1]
        return seconds

    def kept_frames(self, frames_per_second: float) -> np.ndarray:
        """Return positions in `pts` of the frames on screen at 0, 1/r, 2/r ... seconds, each once, ascending.

        Containers round times to their tick (1 ms in Matroska), so a frame counts as shown half a tick early, at most 1
        ms.
        """
        times = self.times
        slack = min(self.tick / 2, 1e-3) + 1e-9
        # Index of the first grid point at which each frame may be on screen; it ends where the next frame's begins.
        first = np.maximum(0, np.ceil((times - slack) * frames_per_second))
        last = np.floor((times[-1] + slack) * frames_per_second) + 1
        return np.flatnonzero(first < np.append(first[1:], last))

    def segments(self, seconds: float) -> list[Segment]:
        """Split the video at key frames into parts of at least `seconds` each (the last may be shorter)."""
        if len(self.packet_pts):
            seconds = max(seconds, (int(self.pts[-1]) - int(self.pts[0])) * self.tick / PARTS_READ_FROM_THE_START)
        starts = [int(self.key_pts[0])]
        for key in self.key_pts[1:].tolist():
            if (key - starts[-1]) * self.tick >= seconds:
                starts.append(key)
        stops = [*starts[1:], int(self.pts[-1]) + 1]
        return [Segment(n, start, stop) for n, (start, stop) in enumerate(zip(starts, stops, strict=True))]

    def playing_seconds(self, first: int, last: int) -> float:
        """Return the seconds between two ticks in which frames are shown; a hole counts as one usual frame interval."""
        frames = int(np.searchsorted(self.pts, last, side="right") - np.searchsorted(self.pts, first))
        usual = float(np.median(np.diff(self.pts)))
        return min(float(last - first), frames * usual) * self.tick

    @property
    def shown_seconds(self) -> float:
        """Length of the video in seconds; in a video with holes, each hole counts as one usual frame interval."""
        usual = float(np.median(np.diff(self.pts))) * self.tick
        return min(self.real_seconds, len(self.pts) * usual) if self.holes else self.real_seconds

    def key_before(self, pts: int) -> int:
        """Return the ticks of the last key frame at or before `pts`."""
        return int(self.key_pts[max(0, int(np.searchsorted(self.key_pts, pts, side="right")) - 1)])

    def to_bytes(self) -> bytes:
        """Serialize the index as .npz. Times are stored as differences, which compress to a few bytes a second."""
        record = {k: v for k, v in asdict(self).items() if k not in ARRAYS}
        text = json.dumps({"format": INDEX_FORMAT, **record})
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            record=np.frombuffer(text.encode(), np.uint8),
            **{name: np.diff(getattr(self, name), prepend=0) for name in ARRAYS},
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> VideoIndex:
        """Deserialize `to_bytes`. Raises ValueError for other content or another format."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                record = json.loads(archive["record"].tobytes())
                arrays = {name: archive[name].cumsum() for name in ARRAYS}
        except (OSError, KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a video index: {error}") from error
        known = {field.name for field in fields(cls)} - set(ARRAYS)
        if record.pop("format", None) != INDEX_FORMAT or record.keys() != known:
            raise ValueError("a video index of an unsupported format")
        record["time_base"] = tuple(record["time_base"])
        record["joins"] = tuple(record["joins"])
        record["heals"] = tuple(map(tuple, record["heals"]))
        record["warnings"] = tuple(record["warnings"])
        return cls(**arrays, **record)


def index_video(path: str) -> VideoIndex:
    """Index a file in one pass over its packets.

    Raises:
        VideoError: the file cannot be read as a video of two frames or more; the message gives reason and remedy.
    """
    path = files.absolute(path)
    with open_container(path) as container:
        stream = video_stream(container, path)
        return _build_index(path, container, stream, scan(container, stream))


def _build_index(path: str, container: InputContainer, stream: VideoStream, packets: Scan) -> VideoIndex:
    context, picture = stream.codec_context, packets.picture
    codec, base = context.codec.canonical_name, stream.time_base or Fraction(1, 90000)
    times = _timeline(path, container, stream, packets)
    step = packets.last_duration or int(np.median(np.diff(times.pts)))
    real = float((int(times.pts[-1]) - int(times.pts[0]) + step) * base)
    coded = (picture.width, picture.height) if picture else (context.width, context.height)
    shown = orientation(picture) if picture else Orientation()
    width, height = _displayed(coded, stream.sample_aspect_ratio, shown.rotation)
    size_bytes, mtime_ns = file_stamp(path)
    streams, declared = film_streams(container), _declared_seconds(container, stream)
    field_pairs, false_marks = bool(packets.column("second").any()), _false_marks(packets)
    unusual = field_pairs or false_marks or shown.mirrored or any(packets.skipped) or stream.index != streams[0].index
    return VideoIndex(
        path=path,
        size_bytes=size_bytes,
        mtime_ns=mtime_ns,
        digest=_digest(packets, stream, (width, height, shown.rotation), mirrored=shown.mirrored),
        container=container.format.name,
        codec=codec,
        pixel_format=str(context.pix_fmt),
        time_base=(base.numerator, base.denominator),
        pts=times.pts,
        key_pts=times.key_pts,
        width=width,
        height=height,
        coded_width=coded[0],
        coded_height=coded[1],
        rotation=shown.rotation,
        mirrored=shown.mirrored,
        color_range=int(context.color_range),
        color_space=int(context.colorspace),
        average_rate=float(stream.average_rate or 0) or (len(times.pts) / real if real else 0.0),
        declared_seconds=declared,
        real_seconds=real,
        leading_frames=times.leading,
        timed=times.timed,
        joins=times.joins,
        heals=times.heals,
        packet_pts=times.packet_times,
        field_pairs=field_pairs,
        false_marks=false_marks,
        holes=len(times.holes),
        streams=len(streams),
        discarded=sum(packets.hidden),
        resized=len(packets.parameters - {frozenset()}) > 1,
        rules=DECODING_RULES if unusual or not times.plain else 1,
        warnings=remarks(path, streams, stream, packets, times, shown, declared_seconds=declared, real_seconds=real),
    )


def _timeline(path: str, container: InputContainer, stream: VideoStream, packets: Scan) -> Timeline:
    """Return the file's times. If they cannot be trusted, fall back to decoding times, or to times by packet number."""
    codec, tick = stream.codec_context.codec.canonical_name, float(stream.time_base or Fraction(1, 90000))
    reordered = times_contradict(stream.codec_context.codec, packets)
    times = timeline(path, codec, tick, packets, in_decoder_order=reordered)
    if times.timed and not times.joins and times_are_of_decoding(path, container, stream, packets):
        reordered = True
        times = timeline(path, codec, tick, packets, in_decoder_order=True)
    if len(times.packet_times) or times_follow_seeks(path, packets, timed=times.timed):
        return times
    return timeline(path, codec, tick, packets, in_decoder_order=reordered, numbered=True)


def _false_marks(packets: Scan) -> int:
    """Count the packets marked as key frames at which decoding cannot start."""
    return int((packets.column("marked") & (packets.column("starts") == 0) & ~packets.column("second")).sum())


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Return the video stream's own length if the container has it, since audio may be longer."""
    tick = stream.time_base or Fraction(0)
    if stream.duration:
        return float(stream.duration * tick)
    parts = stream.metadata.get("DURATION", "").split(":")
    if len(parts) == 3:
        seconds = float(parts[0]) * 3600 + float(parts[1]) * 60 + float(parts[2])
    else:
        seconds = float(container.duration or 0) / av.time_base
    # Matroska counts from 0, wherever the first frame is.
    begins = float((stream.start_time or 0) * tick) if "matroska" in container.format.name else 0.0
    return max(0.0, seconds - max(0.0, begins))


def _displayed(coded: tuple[int, int], pixel_aspect: Fraction | None, rotation: int) -> tuple[int, int]:
    width, height = coded
    if pixel_aspect and pixel_aspect != 1:
        width = max(2, round(width * pixel_aspect))
    return (height, width) if rotation % 180 else (width, height)


def _digest(packets: Scan, stream: VideoStream, shown: tuple[int, int, int], *, mirrored: bool) -> str:
    """Hash times, sizes, the beginnings of key frames, and how pictures are displayed: size, rotation, mirroring."""
    context = stream.codec_context
    facts = [f"{context.name} {context.width}x{context.height} {stream.time_base}"]
    if shown != (context.width, context.height, 0):
        facts.append(" {}x{} {}".format(*shown))
    if mirrored:
        facts.append(" mirrored")
    return packets.digest(*facts)
