"""Ingest: a Ray Data job that decodes every video once, by key-frame-aligned segments, into the frame store.

A task decodes the frames that one segment still lacks and writes them as a data file; the driver commits those files
to the datasets as results come in, every COMMIT_SECONDS. A killed ingest therefore repeats the segments in flight and
those few seconds, and one with nothing to do starts no Ray.
"""

from __future__ import annotations

import functools
import json
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dora_ray import files
from dora_ray.data import store as frame_store
from dora_ray.data.decoders import get_decoder, scaled_size
from dora_ray.data.sources import find_videos
from dora_ray.data.store import StoredVideo
from dora_ray.data.video import VideoIndex
from dora_ray.errors import VideoError

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 10.0
# A task that takes longer than this hangs: the slowest segment worth having (60 s of 4K VP9) decodes in a tenth of it.
STALL_SECONDS = 1800.0


@dataclass(frozen=True)
class IngestProgress:
    """How far an ingest is; frames are kept frames, `missing` those among the done ones that cannot be decoded."""

    videos: int
    segments: int
    done_segments: int
    frames: int
    done_frames: int
    missing: int
    seconds: float


@dataclass(frozen=True)
class _Work:
    """The frames of one segment that are not stored yet."""

    path: str
    video_id: str
    uri: str
    segment: int
    pts: list[int]


def ingest(
    videos: Sequence[str],
    *,
    store: str,
    decoder: str,
    frames_per_second: float,
    short_side: int,
    jpeg_quality: int,
    segment_seconds: float,
    progress: Callable[[IngestProgress], None] | None = None,
) -> list[StoredVideo]:
    """Bring the videos into the store and open them, sorted by path; does nothing where everything is stored.

    Args:
        videos: patterns of `video.find_videos`.
        store: folder or URI that every node can write.
        decoder: "pyav", "decord" or "torchcodec".
        frames_per_second: kept frames for each second of video.
        short_side: of a stored frame, pixels.
        jpeg_quality: 1 to 100.
        segment_seconds: least length of a task's part of a video, rounded up to a key frame.
        progress: told at the start and after every segment.

    Raises:
        VideoError: a video cannot be found, read or decoded at all, or the decoder would be wrong on it.
        ConfigError: the decoder is not installed.
    """
    store = files.absolute(store)
    indexes = _indexes(videos, store=store, decoder=decoder)
    setting = {"frames_per_second": frames_per_second, "short_side": short_side, "jpeg_quality": jpeg_quality}
    uris = {i.video_id: frame_store.dataset_uri(store, i.video_id, **setting) for i in indexes}
    work = [
        part for index in indexes for part in _pending(index, uris[index.video_id], frames_per_second, segment_seconds)
    ]
    if work:
        for uri in sorted({part.uri for part in work}):
            frame_store.create_dataset(uri)
        task = functools.partial(
            ingest_segment, store=store, decoder=decoder, short_side=short_side, jpeg_quality=jpeg_quality
        )
        with _cluster():
            _commit_results(work, _run_tasks(work, task), num_videos=len(indexes), progress=progress)
    return frame_store.open_videos(indexes, store=store, **setting)


def ingest_segment(
    row: dict[str, Any], *, store: str, decoder: str, short_side: int, jpeg_quality: int
) -> dict[str, Any]:
    """The task: decode one segment's frames and write them; returns what the driver needs to commit them."""
    part = _Work(**json.loads(row["work"]))
    try:
        fragments, missing = _write_segment(part, store, decoder, short_side, jpeg_quality)
    except VideoError as error:
        return {"uri": part.uri, "fragments": "[]", "frames": 0, "missing": 0, "error": str(error)}
    return {
        "uri": part.uri,
        "fragments": json.dumps(fragments),
        "frames": len(part.pts),
        "missing": missing,
        "error": "",
    }


def _indexes(videos: Sequence[str], *, store: str, decoder: str) -> list[VideoIndex]:
    """The videos' indexes, copies of one file counted once."""
    library = get_decoder(decoder)
    indexes = {}
    for path in find_videos(videos):
        index = frame_store.load_index(path, store=store)
        reason = library.refusal(index)
        if reason:
            raise VideoError(f"{path}: decoder {decoder} is refused: {reason}; use data.decoder=pyav")
        for warning in index.warnings:
            logger.warning("%s", warning)
        indexes.setdefault(index.video_id, index)
    return list(indexes.values())


def _pending(index: VideoIndex, uri: str, frames_per_second: float, segment_seconds: float) -> list[_Work]:
    lacking = frame_store.unstored_frames(index, uri, frames_per_second=frames_per_second)
    parts = []
    for segment in index.segments(segment_seconds) if len(lacking) else ():
        first, last = np.searchsorted(lacking, [segment.start_pts, segment.stop_pts])
        if last > first:
            parts.append(_Work(index.path, index.video_id, uri, segment.number, lacking[first:last].tolist()))
    return parts


def _write_segment(part: _Work, store: str, decoder: str, short_side: int, jpeg_quality: int) -> tuple[list[str], int]:
    index = replace(_worker_index(store, part.video_id), path=part.path)
    frames = get_decoder(decoder).decode(index, part.pts, short_side=short_side)
    rows = {f.pts: frame_store.frame_row(f, segment=part.segment, jpeg_quality=jpeg_quality) for f in frames}
    width, height = scaled_size(index.width, index.height, short_side)
    lost = [
        frame_store.missing_row(pts, segment=part.segment, width=width, height=height)
        for pts in part.pts
        if pts not in rows
    ]
    ordered = sorted([*rows.values(), *lost], key=lambda row: row["pts"])
    return frame_store.write_rows(part.uri, ordered), len(lost)


@functools.lru_cache(maxsize=8)
def _worker_index(store: str, video_id: str) -> VideoIndex:
    index = frame_store.stored_index(store, video_id)
    if index is None:
        raise VideoError(
            f"{files.join(store, video_id)}: has no index here; the store must be reachable from every node"
        )
    return index


def _commit_results(
    work: Sequence[_Work],
    results: Iterator[dict[str, Any]],
    *,
    num_videos: int,
    progress: Callable[[IngestProgress], None] | None,
) -> None:
    """Commit what the tasks wrote as it comes, and what has come when something fails."""
    start = time.monotonic()
    total = sum(len(part.pts) for part in work)
    state = IngestProgress(num_videos, len(work), 0, total, 0, 0, 0.0)
    written: dict[str, list[str]] = defaultdict(list)
    errors: list[str] = []
    committed = start
    _tell(progress, state)
    try:
        for result in results:
            written[result["uri"]] += json.loads(result["fragments"])
            errors += [result["error"]] if result["error"] else []
            now = time.monotonic()
            state = replace(
                state,
                done_segments=state.done_segments + 1,
                done_frames=state.done_frames + int(result["frames"]),
                missing=state.missing + int(result["missing"]),
                seconds=now - start,
            )
            if now - committed > COMMIT_SECONDS:
                _commit_all(written)
                committed = time.monotonic()
            _tell(progress, state)
    finally:
        _commit_all(written)
    if errors:
        raise VideoError(errors[0] + (f" (and {len(errors) - 1} more segments)" if len(errors) > 1 else ""))


def _commit_all(written: dict[str, list[str]]) -> None:
    for uri in list(written):
        fragments = written.pop(uri)
        if fragments:
            frame_store.commit(uri, fragments)


def _tell(progress: Callable[[IngestProgress], None] | None, state: IngestProgress) -> None:
    if progress is not None:
        progress(state)


@contextmanager
def _cluster() -> Iterator[None]:
    """The Ray cluster of the caller, or one of this machine that ends with the ingest."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


def _run_tasks(work: Sequence[_Work], task: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results in the order they finish. Raises VideoError when nothing has finished for STALL_SECONDS."""
    results: queue.Queue[Any] = queue.Queue()
    stop = threading.Event()
    thread = threading.Thread(target=_consume, args=(work, task, results, stop), name="dora-ray-ingest", daemon=True)
    thread.start()
    try:
        for done in range(len(work)):
            try:
                result = results.get(timeout=STALL_SECONDS)
            except queue.Empty:
                raise VideoError(
                    f"ingest: {len(work) - done} of {len(work)} segments are left and none has finished in"
                    f" {STALL_SECONDS:.0f} s; what was done is kept: look for free CPUs (ray status) and start again,"
                    " with data.decoder=pyav"
                ) from None
            if isinstance(result, BaseException):
                raise result
            yield result
        thread.join()
    finally:
        stop.set()


def _consume(
    work: Sequence[_Work], task: Callable[..., dict[str, Any]], results: queue.Queue[Any], stop: threading.Event
) -> None:
    try:
        for row in _dataset(work, task).iter_rows():
            results.put(row)
            if stop.is_set():
                return
    except Exception as error:  # noqa: BLE001  it is raised again by the thread that waits for the results
        results.put(error)


def _dataset(work: Sequence[_Work], task: Callable[..., dict[str, Any]]) -> Any:
    """One block and one task for each segment, so that a retry repeats one segment."""
    import ray.data

    # Our progress callback speaks for the job: Ray Data's note that its bars are off, and its last line, are left out.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    items = [{"work": json.dumps(vars(part))} for part in work]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(task, num_cpus=_task_cpus())
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


def _task_cpus() -> float:
    """A core for each task, and half of one where the cluster has a single core that its caller may sit on."""
    import ray

    return 1.0 if ray.cluster_resources().get("CPU", 0.0) >= 2 else 0.5
