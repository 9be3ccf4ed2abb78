"""Remote videos are copied to the node once, for decoders that read local files only."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from dora_ray.errors import VideoError
from dora_ray.video import copies
from dora_ray.video.copies import local_file
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.synthetic import read_counter
from tests.video import videos


@pytest.fixture
def remote(tmp_path, monkeypatch) -> VideoIndex:
    """Return the index of a video in an object store, with an empty temporary folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(copies.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    address = f"memory://{tmp_path.name}/walk.mp4"
    with fsspec.open(address, "wb") as file:
        file.write(videos.h264(tmp_path).read_bytes())
    return index_video(address)


def test_a_local_file_is_read_where_it_is(tmp_path):
    index = index_video(str(videos.h264(tmp_path)))
    assert local_file(index) == index.path


def test_decord_reads_remote_files(remote):
    pytest.importorskip("decord")
    decoder = get_decoder("decord")
    assert decoder.refusal(remote) is None
    assert [read_counter(f.y) for f in decoder.decode(remote, remote.pts[::5], short_side=64)] == list(range(0, 40, 5))


def test_a_copy_is_made_once_and_removed_when_nobody_asks_for_long(remote):
    first = local_file(remote)
    assert Path(first).read_bytes() == fsspec.open(remote.path, "rb").open().read()
    made = Path(first).stat().st_ino
    assert (local_file(remote), Path(first).stat().st_ino) == (first, made)
    old = time.time() - copies.UNUSED_SECONDS - 60
    os.utime(first, (old, old))
    assert local_file(remote) == first
    assert Path(first).stat().st_mtime > old + 60, "it was asked for"
    os.utime(first, (old, old))
    other = local_file(replace(remote, mtime_ns=7))
    assert other != first
    assert not Path(first).exists()
    assert not list(Path(first).parent.glob("*.partial"))


def test_a_file_that_changed_is_not_taken_for_the_one_indexed(remote):
    with fsspec.open(remote.path, "wb") as file:
        file.write(b"shorter")
    with pytest.raises(VideoError, match=r"walk\.mp4: size changed since it was indexed"):
        local_file(remote)


def test_a_file_that_is_gone_and_a_disk_without_room_are_named(remote, monkeypatch):
    fsspec.filesystem("memory").rm(remote.path)
    with pytest.raises(VideoError, match=r"walk\.mp4: cannot be copied .*; or use data\.decoder=pyav"):
        local_file(remote)
    monkeypatch.setattr(copies, "SPARE_BYTES", 1 << 60)
    with pytest.raises(VideoError, match=r"has .* GB free of the 0\.0 GB needed; set TMPDIR to a larger disk"):
        local_file(remote)
