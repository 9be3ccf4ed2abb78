"""Ingest: a Ray Data job that decodes every video once into the frame store, in segments that start at key frames.

A task decodes the frames that one segment still lacks and writes them as data files. The driver commits these files to
the datasets every COMMIT_SECONDS as results arrive, so a killed ingest repeats only the segments in flight and those
seconds, and an ingest with nothing to do does not start Ray. A task that hangs is killed with its process; if it hangs
twice, the segment's frames count as unreadable, unless none of the video can be read. Tasks decode without their
environment's secrets and with limited memory (`shield`).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.store import datasets
from dora_ray.store import frames as frame_store
from dora_ray.store.frames import FrameFormat, StoredVideo
from dora_ray.store.hangs import HANGS
from dora_ray.store.indexes import load_index
from dora_ray.store.ray_tasks import ray_cluster, run_tasks
from dora_ray.store.segments import Work, find_work, ingest_segment
from dora_ray.store.shield import blanked
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import VideoIndex
from dora_ray.video.several import index_all, refuse_unreadable
from dora_ray.video.sources import find_videos

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 10.0
# More than all attempts at a segment take, process starts included: if no task ends for this long, none is running.
STALL_LIMITS = 5


@dataclass(frozen=True)
class IngestProgress:
    """Progress of an ingest. `frames` counts kept frames; `missing` counts the undecodable ones among those done."""

    videos: int
    segments: int
    done_segments: int
    frames: int
    done_frames: int
    missing: int
    seconds: float


Progress = Callable[[IngestProgress], None]


class Turn(NamedTuple):
    """Group of segments to finish before the next group begins: number of segments, and a limit of concurrent tasks."""

    segments: int
    max_tasks: int | None


def ingest(
    videos: Sequence[str],
    *,
    store: str,
    decoder: str,
    form: FrameFormat,
    segment_seconds: float,
    decode_seconds: float,
    node_label: str | None = None,
    cache: str | None = None,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> list[StoredVideo]:
    """Store the frames of videos and open them, sorted by path; does nothing if everything is stored.

    Args:
        videos: patterns of `video.find_videos`.
        store: folder or URI that every node can write.
        decoder: "pyav", "decord" or "torchcodec".
        form: format of the stored frames.
        segment_seconds: minimum length of a task's part of a video, rounded up to a key frame.
        decode_seconds: time limit for decoding ten seconds of video, after which the task's process is killed.
        node_label: value of the node label `role` that tasks are pinned to; None: any node.
        cache: folder on every node to which datasets are copied before they are read; None: no copy.
        skip_unreadable: leave out unreadable videos, with a warning.
        progress: called at the start and after every segment.

    Raises:
        VideoError: names all videos that cannot be found, read or decoded at all, or that the decoder refuses; with
            `skip_unreadable`, only if no video remains.
        ConfigError: the decoder is not installed.
    """
    store = files.absolute(store)
    indexes = find_indexes(videos, store=store, decoder=decoder, skip_unreadable=skip_unreadable)
    work = find_work(indexes, store=store, form=form, segment_seconds=segment_seconds, decode_seconds=decode_seconds)
    failed = ingest_work(
        work,
        store=store,
        decoder=decoder,
        form=form,
        node_label=node_label,
        progress=progress,
        num_videos=len(indexes),
        commit_seconds=COMMIT_SECONDS,
    )
    stored = []
    for index in indexes:
        uri = frame_store.dataset_uri(store, index.video_id, form)
        try:
            if uri not in failed:
                stored += frame_store.open_videos([index], store=store, form=form, cache=cache)
        except VideoError as error:
            failed[uri] = str(error)
    refuse_unreadable(list(failed.values()), len(indexes), skip_unreadable=skip_unreadable)
    return stored


def find_indexes(videos: Sequence[str], *, store: str, decoder: str, skip_unreadable: bool = False) -> list[VideoIndex]:
    """Return the indexes of the videos, counting copies of one file once.

    Raises:
        VideoError: names all videos that cannot be found or read, or that the decoder refuses; with
            `skip_unreadable`, only if no video remains.
        ConfigError: the decoder is not installed.
    """
    library = get_decoder(decoder)

    def read(path: str) -> VideoIndex:
        index = load_index(path, store=store)
        reason = library.refusal(index)
        if reason:
            raise VideoError(f"{path}: decoder {decoder} is refused: {reason}; use data.decoder=pyav")
        return index

    indexes: dict[str, VideoIndex] = {}
    for index in index_all(find_videos(videos), read, skip_unreadable=skip_unreadable):
        for warning in index.warnings:
            logger.warning("%s", warning)
        indexes.setdefault(index.video_id, index)
    return list(indexes.values())


def ingest_work(
    work: Sequence[Work],
    *,
    store: str,
    decoder: str,
    form: FrameFormat,
    node_label: str | None = None,
    progress: Progress | None = None,
    num_videos: int,
    commit_seconds: float,
    turns: Sequence[Turn] = (),
    stop: threading.Event | None = None,
) -> dict[str, str]:
    """Decode segments into the store, in order; see `ingest`.

    Args:
        work: the segments; if empty, Ray is not started.
        store: folder or URI that every node can write.
        decoder: "pyav", "decord" or "torchcodec".
        form: format of the stored frames.
        node_label: value of the node label `role` that tasks are pinned to.
        progress: called at the start and after every segment.
        num_videos: number of videos of the whole ingest, for its progress.
        commit_seconds: interval at which readers see new frames.
        turns: groups of segments, in order, with a limit of concurrent tasks each; empty: one group without a limit.
        stop: set by another thread to stop the ingest.

    Returns:
        {dataset: error} of the videos whose work failed.

    Raises:
        ClusterError: no task has ended for a long time.
    """
    if not work:
        return {}
    for uri in sorted({part.uri for part in work}):
        datasets.create_dataset(uri)
    with ray_cluster():
        task = functools.partial(ingest_segment, store=store, decoder=decoder, form=form)
        run = functools.partial(
            run_tasks,
            task=task,
            node_label=node_label,
            patience_seconds=STALL_LIMITS * max(part.limit_seconds for part in work),
            variables=blanked([store, *(part.path for part in work)], os.environ),
            stop=stop,
        )
        results = _in_turns(run, work, turns or [Turn(len(work), None)], stop)
        return _commit_results(work, results, num_videos=num_videos, commit_seconds=commit_seconds, progress=progress)


def _in_turns(
    run: Callable[..., Iterator[dict[str, Any]]],
    work: Sequence[Work],
    turns: Sequence[Turn],
    stop: threading.Event | None,
) -> Iterator[dict[str, Any]]:
    """Yield the results of one turn after the other."""
    rest = iter(work)
    for turn in turns:
        items = [json.dumps(vars(part)) for part in islice(rest, turn.segments)]
        if items and not (stop and stop.is_set()):
            yield from run(items, max_tasks=turn.max_tasks)


def _commit_results(
    work: Sequence[Work],
    results: Iterator[dict[str, Any]],
    *,
    num_videos: int,
    commit_seconds: float,
    progress: Progress | None,
) -> dict[str, str]:
    """Commit the tasks' results as they arrive; after a failure, commit those that have arrived.

    Returns:
        {dataset: error} of the videos whose work failed.
    """
    start = time.monotonic()
    total = sum(len(part.pts) for part in work)
    state = IngestProgress(num_videos, len(work), 0, total, 0, 0, 0.0)
    written: dict[str, list[str]] = defaultdict(list)
    hung: dict[str, list[str]] = defaultdict(list)
    errors: dict[str, list[str]] = defaultdict(list)
    committed = start
    _tell(progress, state)
    try:
        for result in results:
            # A video of which every segment hangs is more often an unresponsive server than a damaged file.
            waits = result["hung"] and not (written[result["uri"]] or datasets.has_frames(result["uri"]))
            (hung if waits else written)[result["uri"]] += json.loads(result["fragments"])
            if result["error"]:
                errors[result["uri"]].append(result["error"])
            if result["hung"]:
                logger.warning("%s, %d times: its frames are recorded as unreadable", result["hung"], HANGS)
            now = time.monotonic()
            state = replace(
                state,
                done_segments=state.done_segments + 1,
                done_frames=state.done_frames + int(result["frames"]),
                missing=state.missing + int(result["missing"]),
                seconds=now - start,
            )
            if now - committed >= commit_seconds:
                _commit_all(written)
                committed = time.monotonic()
            _tell(progress, state)
    finally:
        _commit_all(written)
    for uri, reason in _commit_hung(hung).items():
        errors[uri].append(reason)
    return {
        uri: of_video[0] + (f" (and {len(of_video) - 1} more segments)" if len(of_video) > 1 else "")
        for uri, of_video in errors.items()
    }


def _commit_hung(hung: dict[str, list[str]]) -> dict[str, str]:
    """Record hung frames as unreadable in videos that are otherwise readable; return the other videos' errors.

    A video of which every segment hangs is more often an unresponsive server than a damaged file.
    """
    readable = {uri: fragments for uri, fragments in hung.items() if datasets.has_frames(uri)}
    _commit_all(dict(readable))
    return {
        uri: f"{uri}: decoding hung in every attempt, and nothing was recorded; check that the file can be"
        " read on every node, raise data.decode_seconds, or leave the file out"
        for uri in hung
        if uri not in readable
    }


def _commit_all(written: dict[str, list[str]]) -> None:
    for uri in list(written):
        fragments = written.pop(uri)
        if fragments:
            datasets.commit(uri, fragments)


def _tell(progress: Progress | None, state: IngestProgress) -> None:
    if progress is not None:
        progress(state)
