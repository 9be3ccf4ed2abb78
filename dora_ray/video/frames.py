"""Decoded frames, their target size, and the decoder protocol.

H, W height and width of the downscaled picture, both even.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dora_ray.video.index import VideoIndex


@dataclass(frozen=True, eq=False)
class DecodedFrame:
    """Frame as planes: y (H, W), u and v (H / 2, W / 2), uint8, BT.601, full range; pts in ticks of the video."""

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
    """Interface of a decoding library, as needed by the ingest."""

    name: str

    def refusal(self, index: VideoIndex) -> str | None:
        """Return why this decoder would be wrong on the file; None if it is right."""

    def decode(self, index: VideoIndex, pts: Sequence[int], *, short_side: int) -> Iterator[DecodedFrame]:
        """Yield the frames with presentation times `pts`, in that order.

        The times are ascending ticks of `index.pts`, ideally within one segment: decoding starts at the preceding key
        frame. Frames that are undecodable, or depend on damaged ones, are left out.

        Raises:
            VideoError: the file changed, vanished, or is refused.
        """


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return even width and height whose shorter side is at most `short_side` pixels; never enlarges."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, round(width * scale / 2 - 1e-6) * 2), max(2, round(height * scale / 2 - 1e-6) * 2)


def stored_plane(plane: Any) -> np.ndarray:
    """Copy the pixels (H, W) of a plane of an av.VideoFrame."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width].copy()
