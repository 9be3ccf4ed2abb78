"""Frames at which a clip of a video may start, and the reasons why there may be none.

T frames a clip, F frames of a video, E_v starts of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dora_ray.errors import VideoError

logger = logging.getLogger(__name__)


def refuse_without_clips(reasons: Mapping[str, str], *, num_videos: int) -> None:
    """Warn of videos that yield no clip.

    Args:
        reasons: reason by path, of each such video.
        num_videos: number of all videos, including those that yield clips.

    Raises:
        VideoError: no video yields a clip.
    """
    if len(reasons) == num_videos:
        path, reason = next(iter(reasons.items()))
        more = f"; the {num_videos - 1} other videos yield none either" if num_videos > 1 else ""
        raise VideoError(f"no clip fits: {path}: {reason}{more}")
    for path, reason in reasons.items():
        logger.warning("%s yields no clip: %s", path, reason)


def no_clip(times: NDArray[np.float64], num_frames: int, stride_seconds: float) -> str:
    """Return why a video without cuts yields no clip, and the remedy; empty if it yields one.

    Args:
        times: (F,) seconds of its kept frames, ascending.
        num_frames: T.
        stride_seconds: time between a clip's frames.
    """
    if len(clip_table(times, np.zeros(len(times), np.bool_), num_frames, stride_seconds, avoid_cuts=False)):
        return ""
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    length, needed = float(times[-1] - times[0]) if len(times) else 0.0, (num_frames - 1) * stride_seconds
    if step > stride_seconds:
        most = int(length / step) + 1
        fewer = f", and clip.num_frames at most {most}" if most < num_frames else ""
        return (
            f"frames are {step:.4g} s apart, so clip.stride_seconds={stride_seconds:g} would pick the same frame"
            f" twice; it must be at least {step:.4g}{fewer}"
        )
    if length < needed:
        return (
            f"lasts {length:.2f} s, and a clip of clip.num_frames={num_frames} frames, clip.stride_seconds="
            f"{stride_seconds:g} apart, needs {needed:g} s; lower one of the two"
        )
    return (
        f"no {num_frames} frames follow one another about {stride_seconds:g} s apart: many are missing; lower"
        " clip.num_frames, or change clip.stride_seconds"
    )


def clip_table(
    times: NDArray[np.float64], cuts: NDArray[np.bool_], num_frames: int, stride_seconds: float, *, avoid_cuts: bool
) -> NDArray[np.int64]:
    """Return the (E_v, T) stored frames of every clip of one video.

    A clip may start at every stored frame. Its frame i is the stored frame nearest to start + i * stride. A start
    is left out if one of these is off by more than three quarters of the median spacing (a hole, or the end of the
    video), if two of them coincide (fewer frames than the stride asks for), or if a shot starts between its first
    and last frame.

    Args:
        times: (F,) seconds of the stored frames, ascending.
        cuts: (F,) True where a frame starts a new shot.
        num_frames: T.
        stride_seconds: time between frames.
        avoid_cuts: leave out clips that span a cut.
    """
    if len(times) < num_frames:
        return np.empty((0, num_frames), np.int64)
    wanted = times[:, None] + np.arange(num_frames) * stride_seconds
    right = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    frames = np.where(wanted - times[right - 1] <= times[right] - wanted, right - 1, right)
    tolerance = 0.75 * float(np.median(np.diff(times)))
    kept = (np.abs(times[frames] - wanted) <= tolerance).all(axis=1) & (np.diff(frames, axis=1) > 0).all(axis=1)
    if avoid_cuts:
        shot = np.cumsum(cuts)
        kept &= shot[frames[:, -1]] == shot[frames[:, 0]]
    return frames[kept]
