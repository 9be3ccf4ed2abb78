"""How well a batch is shuffled: by the times of its clips in a film of two hours, whose pictures nobody needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dora_ray.clips.plan import Plan
from dora_ray.clips.segments import StreamedVideo, streamed_videos
from dora_ray.config import Config, load_config
from dora_ray.training.launch import make_plan
from dora_ray.video.index import VideoIndex

LONG_SECONDS = 7200


def streamed(config: Config, index: VideoIndex) -> list[StreamedVideo]:
    """The videos of a plan of direct streaming: this one."""
    data = config.data
    return streamed_videos(
        [index], decoder=data.decoder, frames_per_second=data.frames_per_second, short_side=data.short_side
    )


def shuffling(config: Config, index: VideoIndex) -> dict[str, float]:
    """How alike the clips of a batch are, by their times in a two-hour film: from the store and streamed directly.

    Two measures: the share of pairs of a batch that start within a minute of each other, and the correlation of the
    starts of a batch's consecutive clips. Both are 0 at best; the store draws from the whole film.
    """
    long = _longer(index, LONG_SECONDS)
    config = load_config(config, "optim.clips_per_slot=16")
    found = {}
    for source in ("store", "video"):
        plan = make_plan(load_config(config, f"data.source={source}"), streamed(config, long))
        times = np.array([_starts(plan, step) for step in range(20)])
        apart = np.abs(times[:, :, None] - times[:, None, :])[:, ~np.eye(times.shape[1], dtype=bool)]
        name = "store" if source == "store" else "direct"
        found[f"{name}_pairs_within_a_minute"] = float((apart < 60).mean())
        found[f"{name}_neighbor_correlation"] = float(np.corrcoef(times[:, :-1].ravel(), times[:, 1:].ravel())[0, 1])
    return found


def _longer(index: VideoIndex, seconds: int) -> VideoIndex:
    """The index of a film like this one, of another length."""
    step, group = int(np.median(np.diff(index.pts))), int(np.median(np.diff(index.key_pts)))
    pts = np.arange(0, round(seconds / index.tick), step)
    return replace(index, pts=pts, key_pts=pts[:: group // step], real_seconds=float(seconds))


def _starts(plan: Plan, step: int) -> list[float]:
    """(S x M,) seconds at which a batch's clips start."""
    clips = [clip for slot in range(plan.slots) for clip in plan.slot_clips(step, slot)]
    return [float(plan.videos[clip.video].times[clip.frames[0]]) for clip in clips]
