"""A decoded picture, the size it is brought to, and what a decoder has to do.

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
    """Interface of a decoding library, as ingest needs it."""

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


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height, even, with the shorter at most `short_side` pixels; a picture is never enlarged."""
    scale = min(1.0, short_side / min(width, height))
    return max(2, round(width * scale / 2 - 1e-6) * 2), max(2, round(height * scale / 2 - 1e-6) * 2)


def stored_plane(plane: Any) -> np.ndarray:
    """The pixels (H, W) of a plane of an av.VideoFrame, in memory of their own."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width].copy()
