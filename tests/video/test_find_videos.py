"""Finding videos: links, loops, hidden files, names that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from dora_ray.errors import VideoError
from dora_ray.video.index import index_video
from dora_ray.video.sources import find_videos
from tests.video import videos


def names(*patterns):
    return [Path(path).name for path in find_videos([str(pattern) for pattern in patterns])]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "v").mkdir()
    for path in ("far/b.mp4", "v/a.mp4", "v/._a.mp4", "v/.c.mp4"):
        (tmp_path / path).touch()
    (tmp_path / "v" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "v" / "loop").symlink_to(".")
    return tmp_path / "v"


def test_folders_and_globs_find_each_visible_video_once(folder):
    assert names(folder) == ["a.mp4", "b.mp4"]
    assert names(folder / "**") == ["a.mp4", "b.mp4"]
    assert names(folder, folder / "*.mp4", folder / "linked", folder.parent / "far") == ["b.mp4", "a.mp4"]  # far, v
    with pytest.raises(VideoError, match="no video matches"):
        find_videos([str(folder / ".*.mp4")])


def test_of_two_paths_to_one_file_the_shorter_is_taken(folder):
    (folder / "b.mp4").symlink_to(folder.parent / "far" / "b.mp4")
    assert find_videos([str(folder)]) == [str(folder / "a.mp4"), str(folder / "b.mp4")]


def test_a_folder_of_hidden_files_holds_no_video(folder):
    (folder / "a.mp4").unlink()
    (folder / "linked").unlink()
    with pytest.raises(VideoError, match="holds no video"):
        find_videos([str(folder)])


def test_hidden_files_behind_a_uri_are_left_out():
    root = f"memory://{uuid.uuid4().hex}"
    for name in ("a.mp4", "._a.mp4", ".snapshot/a.mp4", "deep/b.mp4"):
        with fsspec.open(f"{root}/{name}", "wb") as file:
            file.write(b"-")
    assert names(root) == ["a.mp4", "b.mp4"]
    assert names(f"{root}/*.mp4") == ["a.mp4"]


def test_macos_metadata_files_are_named_as_such(tmp_path):
    (tmp_path / "._walk.mp4").write_bytes(bytes.fromhex("0005160700020000") + bytes(4088))
    with pytest.raises(VideoError, match=r"macOS metadata of walk\.mp4"):
        index_video(str(tmp_path / "._walk.mp4"))


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 alone")
def test_a_name_that_is_not_utf8_is_printed_escaped(tmp_path):
    video = videos.few_frames(tmp_path, 6)
    os.rename(video, os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    command = [sys.executable, "-m", "dora_ray", "data", "index", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9.mp4" in done.stdout
