"""Statistics of a video from the signatures in its frame store; nothing is decoded.

F stored frames of a video.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dora_ray.store import cuts
from dora_ray.store.frames import StoredVideo, read_signatures


def analyze(video: StoredVideo, *, interval_seconds: float) -> dict[str, Any]:
    """Measure lightness over time and shot changes of one video.

    Lightness is the mean of the luma plane, 0 black to 1 white (the paper: of HSL over time); shot changes are found by
    `cuts.find_cuts` (the paper: by PySceneDetect). The numbers are therefore comparable between videos, but not with
    the paper's.

    Args:
        video: the stored video.
        interval_seconds: length of the intervals over which lightness is averaged.

    Returns:
        Plain values: video, seconds, frames, missing, lightness {mean, standard_deviation, change, by_interval} where
        `change` is the mean absolute difference between neighboring intervals, and shots {changes, times, per_minute}.
    """
    light = cuts.lightness(read_signatures(video))
    part = np.floor(video.times / interval_seconds).astype(int)
    by_interval = np.bincount(part, light) / np.maximum(np.bincount(part), 1)
    by_interval = by_interval[np.bincount(part) > 0]
    seconds = float(video.times[-1])
    times = video.times[video.cuts]
    return {
        "video": video.path,
        "seconds": seconds,
        "frames": len(video),
        "missing": video.missing,
        "lightness": {
            "mean": float(light.mean()),
            "standard_deviation": float(light.std()),
            "change": float(np.abs(np.diff(by_interval)).mean()) if len(by_interval) > 1 else 0.0,
            "by_interval": [round(float(value), 4) for value in by_interval],
        },
        "shots": {
            "changes": len(times),
            "times": [round(float(time), 3) for time in times],
            "per_minute": len(times) / max(seconds / 60, 1e-9),
        },
    }
