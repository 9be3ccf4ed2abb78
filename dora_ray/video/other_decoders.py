"""Alternative decoders for data.decoder, decord and torchcodec, and the files that each refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np

from dora_ray.errors import VideoError
from dora_ray.video.copies import local_file
from dora_ray.video.frames import DecodedFrame, Decoder, scaled_size, stored_plane
from dora_ray.video.index import VideoIndex
from dora_ray.video.remarks import LOST_SECONDS


class DecordDecoder:
    """decord 0.6: fast on plain files, silently wrong on some others, which it therefore refuses."""

    name = "decord"

    def __init__(self, library: Any) -> None:
        self._library = library

    def refusal(self, index: VideoIndex) -> str | None:
        """Return why decord 0.6 is wrong on the file, according to the conformance suite."""
        reasons = (
            ("mpegts" in index.container, "it does not return from MPEG-TS files"),
            (index.codec == "av1", "its FFmpeg of 2021 has no AV1 decoder"),
            (index.discarded > 0, "it ignores the file's edit list and repeats frames"),
            (index.leading_frames, "it returns wrong frames at open groups of pictures"),
            (index.streams > 1, "it may read another one of the file's video streams"),
            (index.mirrored, "it does not mirror pictures"),
            (index.field_pairs, "it counts the two fields of a frame as two frames"),
            (not index.timed, "it invents the times of frames that have none"),
            (
                len(index.packet_pts) > 0,
                "it does not know the times of frames if the clock goes back or times are missing",
            ),
            (index.false_marks > 0, "it starts at frames that are falsely marked as key frames"),
            (index.holes > 0, "it runs out of memory where the clock jumps"),
            (index.resized, "it repeats frames where the size of the pictures changes"),
            (index.codec == "mpeg2video", "it shows neighbors where the size changes, which is detected in H.264 only"),
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
        path = local_file(index)
        try:
            reader = self._library.VideoReader(path, num_threads=1)
            if len(reader) != len(index.pts):
                raise VideoError(
                    f"{index.path}: decord sees {len(reader)} frames of {len(index.pts)}; use data.decoder=pyav"
                )
            for time, number in zip(pts, np.searchsorted(index.pts, pts).tolist(), strict=True):
                yield _from_rgb(reader[number].asnumpy(), int(time), width, height)
        except self._library.DECORDError as error:
            raise VideoError(f"{index.path}: decord fails ({first_line(error)}); use data.decoder=pyav") from error


class TorchCodecDecoder:
    """torchcodec in exact mode, which knows each frame's time."""

    name = "torchcodec"

    def __init__(self, library: Any) -> None:
        self._library = library

    def refusal(self, index: VideoIndex) -> str | None:
        """Return why torchcodec is known to fail on the file."""
        reasons = (
            (index.resized, "it fails where the size of the pictures changes"),
            ("mpegts" in index.container, "it cannot read MPEG-TS"),
            (index.rules > 1, "it is untested on files of this unusual kind (see the warnings of data index)"),
        )
        return next((text for holds, text in reasons if holds), None)

    def decode(self, index: VideoIndex, pts: Sequence[int], *, short_side: int) -> Iterator[DecodedFrame]:
        """See `Decoder.decode`."""
        _check_accepted(self, index)
        width, height = scaled_size(index.width, index.height, short_side)
        path = local_file(index)
        try:
            reader = self._library.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            for time in pts:
                frame = reader.get_frame_played_at((int(time) + 0.5) * index.tick)
                if round(frame.pts_seconds / index.tick) == int(time):
                    yield _from_rgb(frame.data.numpy(), int(time), width, height)
        except (RuntimeError, IndexError) as error:
            raise VideoError(f"{index.path}: torchcodec fails ({first_line(error)}); use data.decoder=pyav") from error


def _from_rgb(rgb: np.ndarray, pts: int, width: int, height: int) -> DecodedFrame:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24").reformat(
        width, height, "yuvj420p", interpolation="AREA", dst_colorspace="ITU601", dst_color_range="JPEG", threads=1
    )
    return DecodedFrame(pts, *map(stored_plane, picture.planes))


def _check_accepted(decoder: Decoder, index: VideoIndex) -> None:
    reason = decoder.refusal(index)
    if reason:
        raise VideoError(f"{index.path}: decoder {decoder.name} is refused: {reason}; use data.decoder=pyav")


def first_line(error: Exception) -> str:
    """Return an error's first line, shortened."""
    return str(error).strip().partition("\n")[0][:200]
