"""Inputs of a run, made from its videos: the plan, its readable contents, and the remaining ingest work.

With clip.shuffle=global everything is ingested first, and the plan covers the readable frames. With `window` the plan
follows from the videos' indexes alone, and the ingest continues during training (`ingest_beside`), in the order in
which the plan's windows need the segments.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dora_ray import files
from dora_ray.clips.contents import Contents, GrowingContents, StoredContents
from dora_ray.clips.plan import Plan, Video
from dora_ray.clips.starts import no_clip, refuse_without_clips
from dora_ray.config import Config, DataConfig
from dora_ray.config_source import flatten
from dora_ray.errors import ClusterError, ConfigError
from dora_ray.store.frames import ComingVideo, FrameFormat, StoredVideo, coming_video
from dora_ray.store.indexes import known_index, load_index
from dora_ray.store.ingest import Progress, find_indexes, ingest
from dora_ray.store.losses import whole_videos
from dora_ray.store.segments import Work, find_work
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.several import index_all
from dora_ray.video.sources import find_videos

logger = logging.getLogger(__name__)

AnyVideo = TypeVar("AnyVideo", bound=Video)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Plan and data of a run.

    Attributes:
        plan: the plan.
        contents: its readable contents.
        work: segments missing in the store, in the order in which the plan needs them.
        awaited: number of leading segments in `work` that the first step needs.
        stored: the videos, if all of them are ingested.
    """

    plan: Plan
    contents: Contents
    work: Sequence[Work] = ()
    awaited: int = 0
    stored: Sequence[StoredVideo] = ()


def make_inputs(config: Config, store: str, on_ingest: Progress | None) -> Inputs:
    """Plan a run, after the complete ingest unless clip.shuffle=window.

    Raises:
        VideoError: a video cannot be read, or no clip fits.
    """
    if config.clip.shuffle == "global":
        videos = ingest_videos(config, store, on_ingest)
        plan = make_plan(config, videos)
        inputs = Inputs(plan, StoredContents(plan, plan_order(videos)), stored=videos)
    else:
        inputs = _coming_inputs(config, store)
    inputs.plan.check()
    return inputs


def _coming_inputs(config: Config, store: str) -> Inputs:
    data, form = config.data, frame_format(config.data)
    skip = data.skip_unreadable
    indexes = find_indexes(data.videos, store=store, decoder=data.decoder, skip_unreadable=skip)
    videos = plan_order(
        [coming_video(index, store=store, form=form, segment_seconds=data.segment_seconds) for index in indexes]
    )
    plan = make_plan(config, videos)
    work = find_work(
        indexes, store=store, form=form, segment_seconds=data.segment_seconds, decode_seconds=data.decode_seconds
    )
    return Inputs(plan, GrowingContents(plan, videos), *in_order_of_need(work, plan, videos))


def in_order_of_need(work: Sequence[Work], plan: Plan, videos: Sequence[ComingVideo]) -> tuple[list[Work], int]:
    """Sort segments by the first unit of the first epoch that needs one of their frames; unneeded ones come last.

    Returns:
        The segments, and the number that the first window needs.
    """
    numbers = {video.video_id: number for number, video in enumerate(videos)}
    needed: dict[tuple[int, int], int] = {}
    windows = plan.windows(0) if plan.clips_per_epoch else []
    units = [unit for window in windows for unit in window.units.tolist()]
    for place, unit in enumerate(units):
        video, first, last = plan.unit_frames(unit)
        begin, end = np.searchsorted(videos[video].edges, [first, last], side="right").tolist()
        for segment in range(begin, end + 1):
            needed.setdefault((video, segment), place)

    def need(part: Work) -> int:
        number = numbers[part.video_id]
        frame = np.searchsorted(videos[number].pts, part.pts[0])
        segment = int(np.searchsorted(videos[number].edges, frame, side="right"))
        return needed.get((number, segment), len(units))

    ordered = sorted(work, key=need)
    in_first = len(windows[0].units) if windows else 0
    return ordered, bisect_left(ordered, in_first, key=need)


def plan_order(videos: Sequence[AnyVideo]) -> tuple[AnyVideo, ...]:
    """Sort videos by content, so that the content of slots does not depend on names or folders."""
    return tuple(sorted(videos, key=lambda video: video.video_id))


def make_plan(config: Config, videos: Sequence[Video]) -> Plan:
    """Return the plan of a configuration for its videos."""
    whole = flatten(config.model_dump(mode="json"))
    shaping: tuple[str, ...] = ("clip.", "crops.", "tracking.", "data.frames_per_second", "data.short_side")
    shaping += ("data.jpeg_quality", "optim.slots", "optim.clips_per_slot", "model.num_heads")
    settings: dict[str, Any] = {key: value for key, value in whole.items() if key.startswith(shaping)}
    windows = config.clip.shuffle == "window"
    if windows:
        settings["data.segment_seconds"] = config.data.segment_seconds
    else:
        del settings["clip.window_segments"]
    return Plan(
        videos=plan_order(videos),
        num_frames=config.clip.num_frames,
        stride_seconds=config.clip.stride_seconds,
        avoid_cuts=config.clip.avoid_cuts,
        seed=config.run.seed,
        slots=config.optim.slots,
        clips_per_slot=config.optim.clips_per_slot,
        clip_size=config.crops.clip_size,
        clip_scale=config.crops.clip_scale,
        aspect_ratio=config.crops.aspect_ratio,
        settings=settings,
        window_segments=config.clip.window_segments if windows else 0,
    )


def frame_format(data: DataConfig) -> FrameFormat:
    """Return the frame format of the configuration: frame rate, short side, JPEG quality."""
    return FrameFormat(data.frames_per_second, data.short_side, data.jpeg_quality)


def ingest_videos(config: Config, store: str, on_ingest: Progress | None = None) -> list[StoredVideo]:
    """Ingest the configuration's videos into the store.

    Raises:
        VideoError: a video cannot be read, or too many of its frames are missing.
    """
    data = config.data
    stored = ingest(
        data.videos,
        store=store,
        decoder=data.decoder,
        form=frame_format(config.data),
        segment_seconds=data.segment_seconds,
        decode_seconds=data.decode_seconds,
        node_label=config.cluster.decode_label,
        cache=files.absolute(data.cache) if data.cache else None,
        skip_unreadable=data.skip_unreadable,
        progress=on_ingest,
    )
    return whole_videos(stored, max_bad_fraction=data.max_bad_fraction, skip_unreadable=data.skip_unreadable)


def store_of(config: Config, run: str) -> str:
    """Return the frame store: as configured, or the folder `store` beside the run's."""
    if config.data.store is not None:
        return files.absolute(config.data.store)
    return files.join(run.rstrip("/").rsplit("/", 1)[0], "store")


def check_videos(config: Config, *, store: str | None = None) -> list[VideoIndex]:
    """Index every video, reusing indexes in the store, and check that some are long enough.

    Args:
        config: the run's.
        store: frame store to keep new indexes in; None: write nothing.

    Raises:
        ConfigError: no video is given.
        VideoError: videos cannot be read (the message names all of them), or all are too short for a clip.
    """
    if not config.data.videos:
        raise ConfigError(
            "no video is named: give yours as a word, `dora-ray train tiny walk.mp4`, or as data.videos=walk.mp4. None "
            "at hand? `dora-ray data synth tour tour` makes tour/film.mp4"
        )
    known = files.absolute(config.data.store) if config.data.store else None

    def read(path: str) -> VideoIndex:
        if store is not None:
            return load_index(path, store=store)
        return (known_index(path, store=known) if known else None) or index_video(path)

    paths = find_videos(config.data.videos)
    return _check_lengths(config, index_all(paths, read, skip_unreadable=config.data.skip_unreadable))


def _check_lengths(config: Config, indexes: list[VideoIndex]) -> list[VideoIndex]:
    """Return the videos if at least one is long enough for a clip, before anything is decoded.

    Raises:
        VideoError: all are too short; the message has a remedy.
    """
    reasons = {}
    for index in indexes:
        times = index.times[index.kept_frames(config.data.frames_per_second)]
        reason = no_clip(times, config.clip.num_frames, config.clip.stride_seconds)
        stride, steps, kept_steps = config.clip.stride_seconds, np.diff(index.times), np.diff(times)
        if reason and len(kept_steps) and np.median(steps) <= stride < np.median(kept_steps):
            reason = (
                f"data.frames_per_second={config.data.frames_per_second:g} keeps too few frames for"
                f" clip.stride_seconds={stride:g}; raise one of the two"
            )
        if reason:
            reasons[index.path] = reason
    refuse_without_clips(reasons, num_videos=len(indexes))
    return indexes


def require_decode_nodes(config: Config) -> None:
    """Refuse a decode label that no node of the cluster has or can get.

    Raises:
        ClusterError: no node has the label; the message lists the existing ones.
    """
    import ray

    from dora_ray.clips.room import nodes
    from dora_ray.ray_internals import has_node_types

    label = config.cluster.decode_label
    if label is None or config.cluster.num_workers == 0 or nodes(label) or has_node_types():
        return
    roles = sorted({node["Labels"].get("role", "none") for node in ray.nodes() if node["Alive"]})
    raise ClusterError(
        f"cluster.decode_label={label}: no node has the label role={label} (roles here: {', '.join(roles)}), so no "
        f'clip could be read. Start nodes with `ray start --labels="role={label}"`, or leave cluster.decode_label out.'
    )
