"""Draw a shot from a video: successive frames without a shot cut.

Legend: T frames, H x W pixels of a frame.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dora_ray.errors import VideoError
from dora_ray.store.cuts import find_cuts, signature
from dora_ray.video.decoders import DecodedFrame, PyAVDecoder
from dora_ray.video.index import VideoIndex

FRAMES_PER_SECOND = 10.0
SHORT_SIDE = 360
TRIES = 4


@dataclass(frozen=True, eq=False)
class Shot:
    """Successive frames of a video.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        times: (T,) seconds from the video's start.
        cuts: (T,) bool, True where a new shot starts.
    """

    frames: np.ndarray
    times: np.ndarray
    cuts: np.ndarray

    @property
    def has_cut(self) -> bool:
        """True if the frames contain a shot cut, across which objects cannot be tracked."""
        return bool(self.cuts.any())

    @property
    def seconds(self) -> float:
        """Duration from the first frame to the last."""
        return float(self.times[-1] - self.times[0])


def draw_shot(index: VideoIndex, rng: np.random.Generator, *, num_frames: int, stride_seconds: float) -> Shot:
    """Draw a shot without a cut from a random position of the video.

    Try a few positions. If a window contains cuts, its longest part between cuts is accepted if it is at least half as
    long as requested; if no position has one, return the longest part of all positions.

    Args:
        index: Index of the video.
        rng: Generator of the positions.
        num_frames: Limits the shot to (num_frames - 1) x stride_seconds.
        stride_seconds: Time between the frames of a clip; the shot is at least this long if possible.

    Raises:
        VideoError: The video is shorter than one stride, or nothing in it can be decoded.
    """
    length = float(index.times[-1])
    span = min((num_frames - 1) * stride_seconds, length // stride_seconds * stride_seconds)
    if span <= 0:
        raise VideoError(f"{index.path}: lasts {length:.2f} s; pictures need two frames {stride_seconds:g} s apart")
    best = None
    for start in rng.uniform(0.0, length - span, size=TRIES):
        window = read_window(index, start=float(start), span=span)
        if window is None:
            continue
        shot = _longest_part(window, at_least=stride_seconds)
        if not shot.has_cut and shot.seconds >= span / 2:
            return shot
        if best is None or (not shot.has_cut, shot.seconds) > (not best.has_cut, best.seconds):
            best = shot
    if best is None:
        raise VideoError(f"{index.path}: fewer than two frames could be decoded; get the file again")
    return best


def read_window(index: VideoIndex, *, start: float, span: float) -> Shot | None:
    """Read ten frames per second from `start` to `start + span`, seconds; None if fewer than two can be decoded."""
    wanted = np.arange(start, start + span + 1e-6, 1 / FRAMES_PER_SECOND)
    positions = np.unique(np.searchsorted(index.times, wanted + 1e-9, side="right") - 1)
    decoded = list(PyAVDecoder().decode(index, index.pts[positions].tolist(), short_side=SHORT_SIDE))
    if len(decoded) < 2:
        return None
    signatures = np.stack([np.frombuffer(signature(frame.y, frame.u, frame.v), np.uint8) for frame in decoded])
    times = index.seconds(np.array([frame.pts for frame in decoded]))
    return Shot(np.stack([rgb(frame) for frame in decoded]), times, find_cuts(signatures))


def _longest_part(window: Shot, *, at_least: float) -> Shot:
    """Return the longest part of the window without a cut; the whole window if no part lasts `at_least` seconds."""
    edges = [0, *np.flatnonzero(window.cuts).tolist(), len(window.times)]
    parts = [
        Shot(window.frames[first:last], window.times[first:last], window.cuts[first:last] & False)
        for first, last in itertools.pairwise(edges)
    ]
    longest = max(parts, key=lambda part: part.seconds)
    return longest if len(parts) > 1 and longest.seconds >= at_least else window


def rgb(frame: DecodedFrame) -> np.ndarray:
    """Convert a decoded frame to (H, W, 3) uint8 RGB."""
    size = (frame.width, frame.height)
    chroma = [Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR) for plane in (frame.u, frame.v)]
    return np.asarray(Image.merge("YCbCr", [Image.fromarray(frame.y), *chroma]).convert("RGB"))
