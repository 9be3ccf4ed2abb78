"""From a configuration to a finished run: check everything, ingest what is missing, start the workers, watch them."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import yaml

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS, complete_checkpoints, newest_meta
from dora_ray.clips.plan import Plan, Video, no_clip, refuse_without_clips
from dora_ray.clips.segments import SegmentPlan, streamed_videos
from dora_ray.cluster.nodes import require_alike
from dora_ray.config import Config, load_config
from dora_ray.config_source import flatten, parse_yaml
from dora_ray.errors import CheckpointError, ConfigError, DoRAError
from dora_ray.store.frames import StoredVideo, known_index, load_index
from dora_ray.store.ingest import IngestProgress, ingest
from dora_ray.store.losses import losses, whole_videos
from dora_ray.training.beginning import with_resolved_init
from dora_ray.training.elastic.requests import caught_signals
from dora_ray.training.measuring import prepare
from dora_ray.training.records.checkpoint import require_plan
from dora_ray.training.records.heartbeat import Heartbeat
from dora_ray.training.records.journal import CONFIG, MISSING_FRAMES, add_event, read_metrics, write_status
from dora_ray.training.records.tail import RunTail
from dora_ray.training.trainer import check_resources, connect, on_devices, run_on_ray
from dora_ray.training.worker import record_failure, train_loop
from dora_ray.training.worlds import Job, LocalWorld
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.several import index_all
from dora_ray.video.sources import find_videos
from dora_ray.weights import require_architecture

logger = logging.getLogger(__name__)

OnMetrics = Callable[[dict[str, Any]], None]
OnIngest = Callable[[IngestProgress], None]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        metrics: its last line of metrics.
        checkpoint: its last checkpoint.
    """

    path: str
    metrics: dict[str, Any] = field(repr=False)
    checkpoint: str


def train(
    config: Config | str | dict[str, Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_metrics: OnMetrics | None = None,
    on_ingest: OnIngest | None = None,
) -> Run:
    """Train an encoder.

    Args:
        config: a Config, or what `load_config` takes. Not given with `resume`: the configuration of the run in `out`.
        out: folder or URI of the run, reachable from every node; not given: runs/<time>.
        resume: go on from the newest checkpoint in `out`.
        overwrite: remove the run that is in `out`.
        on_metrics: called in this process with every new line of metrics.
        on_ingest: called in this process while videos are ingested.

    Raises:
        ConfigError, VideoError, CheckpointError, ClusterError: before anything is written or any GPU is asked for.
        DivergenceError: a number was not finite.
    """
    run = files.absolute(out if out is not None else _default_run())
    config = prepare(load_config(config) if config is not None else saved_config(run, resume=resume))
    _check_folder(run, config, resume=resume, overwrite=overwrite)
    config, given = with_resolved_init(config, run, resume=resume, overwrite=overwrite)
    if given is not None:
        logger.info("%s", given)
    store = _store(config, run)
    indexes = _indexes(config, functools.partial(load_index, store=store))
    with connect(config):
        if config.cluster.num_workers != 0:
            require_alike([index.path for index in indexes])
        placed = on_devices(config)
        check_resources(placed)
        plan = make_plan(config, _planned_videos(config, store, indexes, on_ingest))
        plan.check()
        if resume:
            _check_resume(run, config, plan)
        job = Job(placed, plan, run)
        logger.info("%d videos, %d places where a clip may start", len(indexes), plan.clips_per_epoch)
        _prepare_folder(job, config, overwrite=overwrite)
        with Heartbeat(run), RunTail(run, on_metrics):
            _execute(job)
    return _finished(run)


def _default_run() -> str:
    """A folder named by the time: here, or in a Ray job, whose own folder is removed later, below the home folder."""
    name = f"runs/{datetime.now():%Y-%m-%d-%H%M%S}"
    return f"~/dora-ray/{name}" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else name


@dataclass(frozen=True)
class Checked:
    """A run that could start.

    Attributes:
        run, store: absolute folders or URIs.
        given: what its weights begin with, in words; None for random ones.
        indexes: of its videos.
    """

    run: str
    store: str
    given: str | None
    indexes: list[VideoIndex]


def check(
    config: Config, *, out: str | os.PathLike[str] | None = None, resume: bool = False, overwrite: bool = False
) -> Checked:
    """Make the checks of `train`: folder, images and videos; without Ray, and without writing anything."""
    run = files.absolute(out if out is not None else _default_run())
    config = prepare(config)
    _check_folder(run, config, resume=resume, overwrite=overwrite)
    config, given = with_resolved_init(config, run, resume=resume, overwrite=overwrite)
    return Checked(run, _store(config, run), given, check_videos(config))


def make_plan(config: Config, videos: Sequence[Video]) -> Plan:
    """The plan of a configuration over its videos: stored ones, or streamed ones with data.source=video."""
    whole = flatten(config.model_dump(mode="json"))
    shaping: tuple[str, ...] = ("clip.", "crops.", "tracking.", "data.frames_per_second", "data.short_side")
    shaping += ("data.jpeg_quality", "optim.slots", "optim.clips_per_slot", "model.num_heads")
    if config.data.source == "video":
        shaping += ("data.source", "data.stream_segment_seconds", "data.shuffle_segments", "data.crops_per_clip")
        shaping += ("data.decoder",)
    parts: dict[str, Any] = {
        # By content, so that neither names nor folders matter to what a slot is made of.
        "videos": tuple(sorted(videos, key=lambda video: video.video_id)),
        "num_frames": config.clip.num_frames,
        "stride_seconds": config.clip.stride_seconds,
        "avoid_cuts": config.clip.avoid_cuts,
        "seed": config.run.seed,
        "slots": config.optim.slots,
        "clips_per_slot": config.optim.clips_per_slot,
        "clip_size": config.crops.clip_size,
        "clip_scale": config.crops.clip_scale,
        "aspect_ratio": config.crops.aspect_ratio,
        "settings": {key: value for key, value in whole.items() if key.startswith(shaping)},
    }
    if config.data.source == "store":
        return Plan(**parts)
    data = config.data
    return SegmentPlan(
        **parts,
        segment_seconds=data.stream_segment_seconds,
        shuffle_segments=data.shuffle_segments,
        crops_per_clip=data.crops_per_clip,
        decoder=data.decoder,
        short_side=data.short_side,
        jpeg_quality=data.jpeg_quality,
    )


def saved_config(run: str, *, resume: bool = True) -> Config:
    """The configuration of the run in a folder, for a resume that names none.

    Raises:
        ConfigError: no resume was asked for, or there is no run.
    """
    if not resume:
        raise ConfigError("no configuration was given: name a recipe (paper, released, tiny) or a YAML file")
    path = files.join(run, CONFIG)
    if not files.exists(path):
        raise ConfigError(f"{run} has no {CONFIG}, so there is no run to resume: give the run's folder")
    return load_config(parse_yaml(files.read_text(path), path))


def _prepare_folder(job: Job, config: Config, *, overwrite: bool) -> None:
    """Make the run's folder, with the configuration as it was asked for, and not said to have failed."""
    try:
        if overwrite:
            files.remove(job.run)
        files.write_text(files.join(job.run, CONFIG), yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_status(job.run, state="starting")
        add_event(job.run, "launch")
        stored = [video for video in job.plan.videos if isinstance(video, StoredVideo)]
        for path, text in losses(stored).items():
            add_event(job.run, MISSING_FRAMES, video=path, missing=text)
    except OSError as error:
        raise ConfigError(f"{job.run} cannot be written ({error}): give another --out") from error


def _check_folder(run: str, config: Config, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: go on with the run, or begin it again")
    if overwrite and _store(config, run).startswith(run.rstrip("/") + "/"):
        raise ConfigError(
            f"data.store={config.data.store} is inside {run}, which --overwrite would remove: move the store"
        )
    names = files.list_names(run)
    if not names:
        if resume:
            logger.warning("%s holds no run yet: nothing to resume, it begins at step 0", run)
        if files.exists(run) and not files.is_remote(run) and not os.path.isdir(run):
            raise ConfigError(f"{run} is a file: give a folder")
        return
    is_run = CONFIG in names
    if (resume or overwrite) and not is_run:
        raise ConfigError(
            f"{run} is not empty and not a run of dora_ray (no {CONFIG}): give another folder. Nothing was changed."
        )
    if not resume and not overwrite:
        raise ConfigError(
            f"{run} is in use ({', '.join(names[:4])}): continue it with --resume, replace it with --overwrite, "
            "or give another --out"
        )


def _paths(config: Config) -> list[str]:
    if not config.data.videos:
        raise ConfigError("data.videos is empty: name video files, folders or globs, such as data.videos=[walk.mp4]")
    return find_videos(config.data.videos)


def check_videos(config: Config) -> list[VideoIndex]:
    """Every video, looked at without writing anything, and not again where the configuration's store has its index.

    Raises:
        VideoError: one cannot be read, or all are too short.
    """
    store = files.absolute(config.data.store) if config.data.store else None

    def read(path: str) -> VideoIndex:
        return (known_index(path, store=store) if store else None) or index_video(path)

    return _indexes(config, read)


def _indexes(config: Config, read: Callable[[str], VideoIndex]) -> list[VideoIndex]:
    skip = config.data.skip_unreadable
    return _check_lengths(config, index_all(_paths(config), read, skip_unreadable=skip))


def _check_lengths(config: Config, indexes: list[VideoIndex]) -> list[VideoIndex]:
    """The videos, if one gives a clip: found out before anything is decoded.

    Raises:
        VideoError: none does; it says what helps.
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


def _store(config: Config, run: str) -> str:
    """The frame store: as set, or the folder `store` beside the run's."""
    if config.data.store is not None:
        return files.absolute(config.data.store)
    return files.join(run.rstrip("/").rsplit("/", 1)[0], "store")


def _planned_videos(
    config: Config, store: str, indexes: list[VideoIndex], on_ingest: OnIngest | None
) -> Sequence[Video]:
    """The videos, brought into the store, or with data.source=video as they are."""
    if config.data.source == "store":
        return ingest_videos(config, store, on_ingest)
    data = config.data
    return streamed_videos(
        indexes, decoder=data.decoder, frames_per_second=data.frames_per_second, short_side=data.short_side
    )


def ingest_videos(config: Config, store: str, on_ingest: OnIngest | None = None) -> list[StoredVideo]:
    """Bring the configuration's videos into the store.

    Raises:
        VideoError: a video cannot be read, or too much of one is missing.
    """
    data = config.data
    stored = ingest(
        data.videos,
        store=store,
        decoder=data.decoder,
        frames_per_second=data.frames_per_second,
        short_side=data.short_side,
        jpeg_quality=data.jpeg_quality,
        segment_seconds=data.segment_seconds,
        decode_seconds=data.decode_seconds,
        node_label=config.cluster.decode_label,
        cache=files.absolute(data.cache) if data.cache else None,
        skip_unreadable=data.skip_unreadable,
        progress=on_ingest,
    )
    return whole_videos(stored, max_bad_fraction=data.max_bad_fraction, skip_unreadable=data.skip_unreadable)


def _check_resume(run: str, config: Config, plan: Plan) -> None:
    """CheckpointError when the newest checkpoint is of another architecture or plan, before anything is started."""
    newest = newest_meta(files.join(run, CHECKPOINTS))
    if newest is not None:
        require_architecture(newest[0], config.model_dump(mode="json"))
        require_plan(*newest, plan)


def _execute(job: Job) -> None:
    """Run the workers to the end.

    Raises:
        DoRAError: what the run stopped for.
    """
    try:
        if job.config.cluster.num_workers == 0:
            with caught_signals(signal.SIGINT, signal.SIGTERM):
                train_loop(job, LocalWorld(job))
        else:
            run_on_ray(job)
    except DoRAError as error:
        record_failure(job.run, error)
        raise


def _finished(run: str) -> Run:
    checkpoint = next(complete_checkpoints(files.join(run, CHECKPOINTS)), None)
    if checkpoint is None:
        raise CheckpointError(f"{run} ended without a checkpoint: see {files.join(run, 'events.jsonl')}")
    lines = read_metrics(run)
    return Run(run, lines[-1] if lines else {}, checkpoint)
