"""Reads that hang for ever, really: they end, their clips are marked, and the stream goes on."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dora_ray import files
from dora_ray.clips import local_engine, ray_engine
from dora_ray.clips import slot as slots
from dora_ray.clips.direct import DecodedSegment, decode_segment
from dora_ray.clips.plan import Plan
from dora_ray.clips.segments import SegmentPlan, streamed_videos
from dora_ray.clips.stream import SlotBatch, local_slots, ray_slots
from dora_ray.config import load_config
from dora_ray.store.supervision import EVERYTHING, Watch, given_up
from dora_ray.store.watchdog import NAMESPACE, Ended
from dora_ray.training.launch import ingest_videos, make_plan
from dora_ray.video.index import index_video
from dora_ray.video.synthetic import make_video
from tests.conftest import SMALL

ONE_CLIP = (*SMALL, "optim.clips_per_slot=1", "clip.stride_seconds=0.5", "clip.avoid_cuts=false")
ONE_TASK = {"prefetch": 1, "slots_per_task": 1, "cpus_per_task": 0.5, "num_streams": 1, "node_label": None}
COPY_FOLDER, READ_TASK = files.copy_folder, ray_engine._read_task


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 seconds with a key frame every second."""
    path = tmp_path_factory.mktemp("film") / "walk.mp4"
    return make_video(path, width=160, height=96, num_frames=96, frames_per_second=24, seed=1, group_size=24)


@pytest.fixture
def hanging(film: Path, tmp_path: Path, ray_cluster) -> Iterator[tuple[Plan, set[int]]]:
    """A plan over a store in which one file is a pipe that nobody writes to, and the frames that are in that file."""
    config = load_config("tiny", *ONE_CLIP, f"data.videos=[{film}]", "data.segment_seconds=1")
    (video,) = ingest_videos(config, str(tmp_path / "store"))
    pipe = sorted(Path(video.uri, "data").glob("*.lance"), key=lambda path: path.stat().st_size)[-1]
    pipe.unlink()
    os.mkfifo(pipe)
    import lance

    fragments = lance.dataset(video.uri).get_fragments()
    (broken,) = [fragment for fragment in fragments if fragment.data_files()[0].path == pipe.name]
    before = sum(fragment.count_rows() for fragment in fragments if fragment.fragment_id < broken.fragment_id)
    rows = range(before, before + broken.count_rows())
    lost = {frame for frame, row in enumerate(video.rows.tolist()) if row in rows}
    yield make_plan(config, [video]), lost
    # A writer that opens the pipe and closes it: whoever is still reading gets its end.
    for _ in range(20):
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return


def streaming_plan(path: str, *overrides: str) -> SegmentPlan:
    """A plan that reads the film itself."""
    config = load_config("tiny", *ONE_CLIP, f"data.videos=[{path}]", "data.source=video", *overrides)
    plan = make_plan(config, streamed_videos([index_video(path)], decoder="pyav", frames_per_second=6, short_side=48))
    assert isinstance(plan, SegmentPlan)
    return plan


def first_steps(plan: Plan, lost: set[int]) -> int:
    """So many steps of slot 0 that a clip hangs and a later one does not."""
    hangs = [not lost.isdisjoint(plan.slot_clips(step, 0)[0].frames) for step in range(30)]
    return next(step for step in range(1, 30) if hangs[step - 1] and not hangs[step]) + 1


def test_thread_that_hangs_is_left_behind(hanging: tuple[Plan, set[int]]) -> None:
    plan, lost = hanging
    keys = iter([(step, 0) for step in range(first_steps(plan, lost))])
    batches = list(local_slots(plan, keys, prefetch=2, num_threads=1, decode_seconds=1.0))
    readable = [lost.isdisjoint(plan.slot_clips(batch.step, 0)[0].frames) for batch in batches]
    assert [bool(batch.valid[0]) for batch in batches] == readable
    assert all(batch.final for batch in batches)


@pytest.mark.timeout(60)
def test_two_hung_slots_after_each_other_are_left_behind(hanging: tuple[Plan, set[int]]) -> None:
    """One thread: the second one hangs before the first one is begun again."""
    plan, lost = hanging
    hangs = [step for step in range(60) if not lost.isdisjoint(plan.slot_clips(step, 0)[0].frames)]
    good = next(step for step in range(hangs[1], 60) if step not in hangs)
    keys = iter([(step, 0) for step in (hangs[0], hangs[1], good)])
    batches = list(local_slots(plan, keys, prefetch=2, num_threads=1, decode_seconds=0.5))
    assert [bool(batch.valid[0]) for batch in batches] == [False, False, True]


@pytest.mark.timeout(60)
def test_hung_segment_that_nobody_waits_for_delays_no_other(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot 0's next segment hangs in the background, before slot 1's present one is begun."""
    plan = streaming_plan(str(film), "optim.slots=2", "data.shuffle_segments=1", "data.stream_segment_seconds=1")
    ahead, needed = plan.live_segments(0, 0)[1][0], plan.live_segments(0, 1)[0][0]
    assert ahead not in {needed, plan.live_segments(0, 0)[0][0]}
    released = threading.Event()

    def hanging_decode(plan: SegmentPlan, segment: int, watch: Watch) -> DecodedSegment:
        first = int(plan.segment_frames(segment)[1][0])
        if segment == ahead and first not in watch.given_up:
            watch.begin(first)
            released.wait()
        return decode_segment(plan, segment, watch)

    monkeypatch.setattr(local_engine, "decode_segment", hanging_decode)
    try:
        batches = list(local_slots(plan, iter([(0, 0), (0, 1)]), prefetch=1, num_threads=1, decode_seconds=0.5))
    finally:
        released.set()
    assert all(batch.valid.all() for batch in batches)


def slow_copy(source: str, target: str) -> None:
    time.sleep(1.5)
    COPY_FOLDER(source, target)


def test_copying_a_dataset_takes_no_time_of_its_clips(film: Path, tmp_path: Path, ray_cluster, monkeypatch) -> None:
    """A copy for data.cache may take as long as it takes."""
    words = (*ONE_CLIP, f"data.videos=[{film}]", f"data.cache={tmp_path / 'disk'}")
    config = load_config("tiny", *words)
    plan = make_plan(config, ingest_videos(config, str(tmp_path / "store")))
    monkeypatch.setattr(files, "copy_folder", slow_copy)
    batches = list(local_slots(plan, iter([(0, 0), (1, 0)]), prefetch=1, num_threads=1, decode_seconds=0.5))
    assert all(batch.valid.all() for batch in batches)
    assert list((tmp_path / "disk").glob("*.lance"))


def copying_task(plan: tuple[Any], keys: tuple[tuple[int, int], ...], *rest: Any) -> list[SlotBatch]:
    """The real task, in a process where copying a dataset takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "copy_folder", slow_copy)
        return READ_TASK(plan, keys, *rest)


@pytest.mark.ray
def test_copying_a_dataset_ends_no_process(film: Path, tmp_path: Path, ray_cluster, monkeypatch) -> None:
    words = (*ONE_CLIP, f"data.videos=[{film}]", f"data.cache={tmp_path / 'disk'}")
    config = load_config("tiny", *words)
    plan = make_plan(config, ingest_videos(config, str(tmp_path / "store")))
    monkeypatch.setattr(ray_engine, "_read_task", copying_task)
    batches = list(ray_slots(plan, range(2), [0], **ONE_TASK, decode_seconds=1.0))
    assert all(batch.valid.all() for batch in batches)
    assert list((tmp_path / "disk").glob("*.lance"))


@pytest.mark.ray
@pytest.mark.slow
def test_process_that_hangs_is_ended(hanging: tuple[Plan, set[int]]) -> None:
    plan, lost = hanging
    steps = range(first_steps(plan, lost))
    batches = list(ray_slots(plan, steps, [0], **ONE_TASK, decode_seconds=2.0))
    readable = [lost.isdisjoint(plan.slot_clips(batch.step, 0)[0].frames) for batch in batches]
    assert [bool(batch.valid[0]) for batch in batches] == readable
    from ray.experimental import internal_kv

    assert not internal_kv._internal_kv_list("", namespace=NAMESPACE)


HUNG, DIED = True, False


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ([(3, HUNG)], {3}),
        ([(3, DIED), (3, HUNG)], set()),
        ([(3, DIED)] * 3, set()),
        ([(3, DIED)] * 4, {3}),
        ([(3, HUNG), (5, HUNG)], {3}),
        ([(3, HUNG), (5, HUNG), (5, HUNG)], EVERYTHING),
        ([(item, DIED) for item in range(9)], EVERYTHING),
    ],
)
def test_an_item_is_given_up_when_it_has_hung_twice(ended, expected) -> None:
    """An attempt before the first of these noted nothing, and ended as that one did."""
    assert given_up([Ended(*fields) for fields in ended]) == expected


def dying_task(plan: tuple[Any], keys: tuple[tuple[int, int], ...], *rest: Any) -> list[SlotBatch]:
    """The real task, in a process that is killed while it reads, three times."""
    from ray._private.worker import global_worker

    with pytest.MonkeyPatch.context() as patch:
        if global_worker.core_worker.get_current_task_attempt_number() < 3:
            patch.setattr(slots, "crop_clip", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return READ_TASK(plan, keys, *rest)


@pytest.mark.ray
@pytest.mark.slow
def test_process_that_is_killed_costs_no_clip(film: Path, tmp_path: Path, ray_cluster, monkeypatch) -> None:
    """As by Ray, when a node's memory is full: the clip at hand can be read."""
    config = load_config("tiny", *ONE_CLIP, f"data.videos=[{film}]")
    plan = make_plan(config, ingest_videos(config, str(tmp_path / "store")))
    monkeypatch.setattr(ray_engine, "_read_task", dying_task)
    (batch,) = ray_slots(plan, range(1), [0], **ONE_TASK, decode_seconds=60.0)
    assert batch.valid.all()


@pytest.fixture
def server(film: Path) -> Iterator[tuple[str, threading.Event]]:
    """A web server of the film that stops answering when the event is set."""
    content, stalled, released = film.read_bytes(), threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            if stalled.is_set():
                released.wait()
                return
            first, last = 0, len(content) - 1
            asked = self.headers.get("Range")
            if asked:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(last, int(end) if end else last)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if body:
                self.wfile.write(content[first : last + 1])

        def log_message(self, *_: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/walk.mp4", stalled
    released.set()
    httpd.shutdown()
    httpd.server_close()


def test_server_that_stops_answering_costs_its_segments(server: tuple[str, threading.Event]) -> None:
    url, stalled = server
    plan = streaming_plan(url, "optim.slots=1", "data.shuffle_segments=1")
    (good,) = local_slots(plan, iter([(0, 0)]), prefetch=1, num_threads=1, decode_seconds=60.0)
    assert good.valid.all()
    stalled.set()
    (bad,) = local_slots(replace(plan), iter([(0, 0)]), prefetch=1, num_threads=1, decode_seconds=0.5)
    assert not bad.valid.any()
    assert not np.any(bad.clips)


def hanging_task(plan: tuple[Any], keys: tuple[tuple[int, int], ...], *rest: Any) -> list[SlotBatch]:
    """The real task, in a process where no clip is ever read; what is begun is noted."""
    with Path(ray_engine.plan_of(*plan).videos[0].uri, "begun").open("a") as file:
        file.write(f"{keys[0][0]} ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "crop_clip", lambda *_: threading.Event().wait())
        return READ_TASK(plan, keys, *rest)


@pytest.mark.ray
@pytest.mark.slow
def test_task_that_hung_waits_for_no_other(film: Path, tmp_path: Path, ray_cluster, monkeypatch) -> None:
    """Nor do those that wait for it: where all hang, the first slot is done after its own attempts."""
    config = load_config("tiny", *ONE_CLIP, f"data.videos=[{film}]")
    plan = make_plan(config, ingest_videos(config, str(tmp_path / "store")))
    monkeypatch.setattr(ray_engine, "_read_task", hanging_task)
    options = ONE_TASK | {"prefetch": 3, "cpus_per_task": 3.0}
    batches = list(ray_slots(plan, range(2), [0], **options, decode_seconds=1.0))
    assert not any(batch.valid.any() for batch in batches)
    assert Path(plan.videos[0].uri, "begun").read_text().split() == ["0"] * 3 + ["1"] * 3


@pytest.mark.ray
def test_no_more_tasks_are_begun_than_cpus_are_not_reserved(
    film: Path, tmp_path: Path, ray_cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the cluster's 4 CPUs, 2.5 are a training worker's; two streams share the rest."""
    from ray.util import placement_group, remove_placement_group

    config = load_config("tiny", *ONE_CLIP, f"data.videos=[{film}]")
    plan = make_plan(config, ingest_videos(config, str(tmp_path / "store")))
    reserved = placement_group([{"CPU": 2.5}])
    assert reserved.wait(30)
    options = {"slots_per_task": 1, "cpus_per_task": 0.25, "node_label": None, "decode_seconds": 60.0}
    engine = ray_engine.RayEngine(plan, num_streams=2, **options)
    try:
        assert engine.capacity() == engine._can_run() == 3
        # Slots that hardly fit into the object store are not held ready, and are read side by side all the same.
        monkeypatch.setattr(ray_engine, "READY_SHARE", 0.0)
        engine._looked_at = -math.inf
        assert engine.capacity() == 1
        assert engine._can_run() == 3
    finally:
        engine.close()
        remove_placement_group(reserved)
