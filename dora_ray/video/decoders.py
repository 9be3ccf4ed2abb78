"""Decoders behind one protocol: frames by presentation time, downscaled, as the full-range BT.601 planes of JPEG.

A decoder that is known to show another frame than the one asked for refuses the file and says why: a missing frame is
recorded, a wrong one would go unseen.

H, W height and width of the downscaled picture, both even.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from dora_ray import files
from dora_ray.errors import ConfigError, VideoError
from dora_ray.video.bitstream import reference_test
from dora_ray.video.index import LOST_SECONDS, VideoIndex
from dora_ray.video.sources import open_container, video_stream

NAMES = ("pyav", "decord", "torchcodec")
MAX_READ_ERRORS = 16
# Unspecified color matrices: players take BT.709 from 720 lines on, BT.601 below.
HD_LINES = 720
UNSPECIFIED = 2


@dataclass(frozen=True, eq=False)
class DecodedFrame:
    """One picture: y (H, W), u and v (H / 2, W / 2), uint8, BT.601, full range; pts in ticks of the video."""

    pts: int
    y: np.ndarray
    u: np.ndarray
    v: np.ndarray

    @property
    def height(self) -> int:
        """H, pixels."""
        return int(self.y.shape[0])

    @property
    def width(self) -> int:
        """W, pixels."""
        return int(self.y.shape[1])


class Decoder(Protocol):
    """What ingest needs of a decoding library."""

    name: str

    def refusal(self, index: VideoIndex) -> str | None:
        """Why this decoder would be wrong on the file; None where it is right."""

    def decode(self, index: VideoIndex, pts: Sequence[int], *, short_side: int) -> Iterator[DecodedFrame]:
        """The frames shown from the times `pts` on, in that order.

        The times are ascending ticks of `index.pts`, best within one segment: decoding starts at the key frame before.
        Frames that cannot be decoded, or that depend on damaged ones, are left out.

        Raises:
            VideoError: the file changed, vanished, or is refused.
        """


def get_decoder(name: str) -> Decoder:
    """The decoder of that name.

    Raises:
        ConfigError: an unknown name, or a library that is not installed here.
    """
    if name == "pyav":
        return PyAVDecoder()
    if name == "decord":
        _refuse_decord2()
        return DecordDecoder(_library("decord", "it has wheels for x86-64 Linux and Windows only: pip install decord"))
    if name == "torchcodec":
        hint = "pip install 'dora-ray[torchcodec]' and have FFmpeg's shared libraries on the system"
        return TorchCodecDecoder(_library("torchcodec.decoders", hint))
    raise ConfigError(f"data.decoder: {name!r} is unknown; choose one of {', '.join(NAMES)}")


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height, even, with the shorter at most `short_side` pixels; a picture is never enlarged."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, round(width * scale / 2 - 1e-6) * 2), max(2, round(height * scale / 2 - 1e-6) * 2)


class PyAVDecoder:
    """FFmpeg through PyAV: seeks to the segment's key frame, decodes on, and drops what damage may have touched.

    Pictures that no other leans on are decoded only where they are wanted (H.264 and AV1). That changes no pixel of the
    others, while FFmpeg's own skip_frame=NONREF, which saves hardly more, would show a neighbor in their place.
    """

    name = "pyav"

    def refusal(self, index: VideoIndex) -> str | None:
        """PyAV refuses no file that has an index."""
        return None

    def decode(self, index: VideoIndex, pts: Sequence[int], *, short_side: int) -> Iterator[DecodedFrame]:
        """See `Decoder.decode`."""
        wanted = [int(p) for p in pts]
        if not wanted:
            return
        scaler = _Scaler(index, short_side)
        remaining = iter(wanted[1:])
        target: int | None = wanted[0]
        needed = _needed(_packets(index, index.key_before(wanted[0])), frozenset(wanted))
        for frame in _sound_frames(needed):
            while target is not None and frame.pts > target:
                target = next(remaining, None)
            if target is None:
                return
            if frame.pts == target:
                yield scaler(frame)


class DecordDecoder:
    """decord 0.6: fast on plain files, wrong without a word on some others, which it is not given."""

    name = "decord"

    def __init__(self, library: Any) -> None:
        self._library = library

    def refusal(self, index: VideoIndex) -> str | None:
        """What notes and the conformance suite know decord 0.6 to get wrong."""
        reasons = (
            (files.is_remote(index.path), "it reads local files only"),
            ("mpegts" in index.container, "it does not return from MPEG-TS files"),
            (index.codec == "av1", "its FFmpeg of 2021 has no AV1 decoder"),
            (index.discarded > 0, "it ignores the file's edit list and repeats frames"),
            (index.leading_frames, "it returns wrong frames at open groups of pictures"),
            (index.resized, "it repeats frames where the size of the pictures changes"),
            (index.codec == "mpeg2video", "it shows neighbors where the size changes, which is seen in H.264 alone"),
            (index.declared_seconds - index.real_seconds > LOST_SECONDS, "it repeats frames where the end is lost"),
            (
                index.width * index.coded_height != index.height * index.coded_width and not index.rotation % 180,
                "it ignores non-square pixels",
            ),
        )
        return next((text for holds, text in reasons if holds), None)

    def decode(self, index: VideoIndex, pts: Sequence[int], *, short_side: int) -> Iterator[DecodedFrame]:
        """See `Decoder.decode`."""
        _check_accepted(self, index)
        width, height = scaled_size(index.width, index.height, short_side)
        try:
            reader = self._library.VideoReader(index.path, num_threads=1)
            if len(reader) != len(index.pts):
                raise VideoError(
                    f"{index.path}: decord sees {len(reader)} frames of {len(index.pts)}; use data.decoder=pyav"
                )
            for time, number in zip(pts, np.searchsorted(index.pts, pts).tolist(), strict=True):
                yield _from_rgb(reader[number].asnumpy(), int(time), width, height)
        except self._library.DECORDError as error:
            raise VideoError(f"{index.path}: decord fails ({_first_line(error)}); use data.decoder=pyav") from error


class TorchCodecDecoder:
    """torchcodec in exact mode, which knows each frame's time."""

    name = "torchcodec"

    def __init__(self, library: Any) -> None:
        self._library = library

    def refusal(self, index: VideoIndex) -> str | None:
        """What torchcodec is known to fail on; remote files are not passed to it."""
        if files.is_remote(index.path):
            return "it is given local files only"
        if index.resized:
            return "it fails where the size of the pictures changes"
        return "it cannot read MPEG-TS" if "mpegts" in index.container else None

    def decode(self, index: VideoIndex, pts: Sequence[int], *, short_side: int) -> Iterator[DecodedFrame]:
        """See `Decoder.decode`."""
        _check_accepted(self, index)
        width, height = scaled_size(index.width, index.height, short_side)
        try:
            reader = self._library.VideoDecoder(
                index.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
            )
            for time in pts:
                frame = reader.get_frame_played_at((int(time) + 0.5) * index.tick)
                if round(frame.pts_seconds / index.tick) == int(time):
                    yield _from_rgb(frame.data.numpy(), int(time), width, height)
        except (RuntimeError, IndexError) as error:
            raise VideoError(f"{index.path}: torchcodec fails ({_first_line(error)}); use data.decoder=pyav") from error


class _Scaler:
    """AREA downscale (antialiased, as fast as bilinear), to JPEG's color matrix and range, turned upright."""

    def __init__(self, index: VideoIndex, short_side: int) -> None:
        width, height = scaled_size(index.width, index.height, short_side)
        self._turns = index.rotation // 90
        self._size = (height, width) if self._turns % 2 else (width, height)
        self._guess = "ITU709" if index.coded_height >= HD_LINES else "ITU601"
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> DecodedFrame:
        picture = self._reformatter.reformat(
            frame,
            *self._size,
            format="yuvj420p",
            interpolation="AREA",
            src_colorspace=self._guess if frame.colorspace == UNSPECIFIED else None,
            dst_colorspace="ITU601",
            dst_color_range="JPEG",
            threads=1,
        )
        planes = [_plane(plane, self._turns) for plane in picture.planes]
        return DecodedFrame(frame.pts, *planes)


def _plane(plane: Any, turns: int) -> np.ndarray:
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
    return np.ascontiguousarray(np.rot90(rows, turns)) if turns else rows.copy()


def _from_rgb(rgb: np.ndarray, pts: int, width: int, height: int) -> DecodedFrame:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24").reformat(
        width, height, "yuvj420p", interpolation="AREA", dst_colorspace="ITU601", dst_color_range="JPEG", threads=1
    )
    return DecodedFrame(pts, *(_plane(plane, 0) for plane in picture.planes))


def _packets(index: VideoIndex, key: int) -> Iterator[av.Packet]:
    """The packets from the key frame `key` to the end.

    Some containers seek by decoding time, to some place before, or not at all: a seek that lands behind is repeated two
    seconds earlier, then the file is read from its start.
    """
    for start in (key, key - round(2.0 / index.tick), None):
        found = False
        for packet in _packets_after(index, start if key > index.key_pts[0] else None):
            found = found or (packet.is_keyframe and packet.pts == key)
            if found:
                yield packet
            elif packet.is_keyframe and packet.pts is not None and packet.pts > key:
                break
        if found:
            return
    raise VideoError(
        f"{index.path}: the key frame at {key} is gone; the file changed after it was indexed: start again"
    )


def _packets_after(index: VideoIndex, start: int | None) -> Iterator[av.Packet]:
    """Packets from a seek to `start` ticks, or from the beginning; steps over a bounded number of unreadable places."""
    with open_container(index.path) as container:
        stream = video_stream(container, index.path)
        stream.thread_count = 1
        if start is not None:
            try:
                container.seek(start, stream=stream, backward=True)
            except av.FFmpegError:
                return
        for _ in range(MAX_READ_ERRORS):
            try:
                yield from container.demux(stream)
                return
            except av.FFmpegError:
                continue


def _needed(packets: Iterator[av.Packet], wanted: frozenset[int]) -> Iterator[av.Packet]:
    """Without the packets whose picture is neither wanted nor leant on by another; the empty last one stays."""
    is_reference: Callable[[memoryview], bool] | None = None
    for packet in packets:
        if is_reference is None:
            context = packet.stream.codec_context
            is_reference = reference_test(context.codec.canonical_name, context.extradata)
        if not packet.size or packet.pts in wanted or is_reference(memoryview(packet)):
            yield packet


def _sound_frames(packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
    """Frames in the order shown, without those that damage may have reached.

    Damage lasts until the next key frame; frames stored after that key frame and shown before it still lean on what was
    damaged. The last packet is empty and makes the decoder give what it holds.
    """
    suspects: set[int | None] = {None}
    waiting: set[int | None] = set()
    broken, tainted_before = False, None
    for packet in packets:
        if packet.is_keyframe:
            tainted_before, broken = (packet.pts if broken else None), False
        broken = broken or packet.is_corrupt
        waiting.add(packet.pts)
        if broken or (tainted_before is not None and packet.pts is not None and packet.pts < tainted_before):
            suspects.add(packet.pts)
        try:
            frames = packet.decode()
        except av.FFmpegError:
            broken = True
            suspects.add(packet.pts)
            continue
        for frame in frames:
            waiting.discard(frame.pts)
            if frame.is_corrupt:
                broken = True
                suspects |= waiting
            elif frame.pts not in suspects:
                yield frame


def _check_accepted(decoder: Decoder, index: VideoIndex) -> None:
    reason = decoder.refusal(index)
    if reason:
        raise VideoError(f"{index.path}: decoder {decoder.name} is refused: {reason}; use data.decoder=pyav")


def _refuse_decord2() -> None:
    """It installs a module of decord's name, and was seen to show wrong frames with a line on stderr only."""
    try:
        found = importlib.metadata.version("decord2")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"data.decoder: decord2 {found} is installed in decord's place, and shows wrong frames of some files; pip"
        " uninstall decord2 and pip install --force-reinstall decord, or use data.decoder=pyav"
    )


def _library(name: str, hint: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        package = name.partition(".")[0]
        reason = _first_line(error)
        raise ConfigError(
            f"data.decoder: {package} cannot be used here ({reason}); {hint}, or use data.decoder=pyav"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
