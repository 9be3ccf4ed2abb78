"""Finding files below a folder."""

from __future__ import annotations

import os

import pytest

from dora_ray.folders import visible_files


def names(folder):
    return [str(path.relative_to(folder)) for path in visible_files(folder, {".mp4"})]


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_linked_folders_are_entered_once_and_loops_end(tmp_path):
    root, far = tmp_path / "v", tmp_path / "far"
    touch(root / "a.mp4", root / "deep" / "b.mp4", far / "c.mp4", far / "more" / "d.MP4", tmp_path / "outside.mp4")
    for name, target in (("1", far), ("2", far), ("up", tmp_path), ("loop", root), ("deep/loop", root / "deep")):
        (root / name).symlink_to(target)
    (far / "back").symlink_to(root)
    assert names(root) == ["1/c.mp4", "1/more/d.MP4", "a.mp4", "deep/b.mp4"]


def test_a_folder_keeps_its_own_path_where_a_link_comes_first(tmp_path):
    touch(tmp_path / "z" / "inner" / "a.mp4")
    (tmp_path / "a").symlink_to(tmp_path / "z" / "inner")
    assert names(tmp_path) == ["z/inner/a.mp4"]


def test_links_from_linked_folders_are_followed(tmp_path):
    touch(tmp_path / "2" / "a.mp4")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "next").symlink_to(tmp_path / "2")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "first").symlink_to(tmp_path / "1")
    assert names(tmp_path / "v") == ["first/next/a.mp4"]
    (tmp_path / "root").symlink_to(tmp_path / "v")
    assert names(tmp_path / "root") == ["first/next/a.mp4"]


def test_hidden_files_and_folders_are_left_out_below_a_hidden_root_too(tmp_path):
    root = tmp_path / ".cache"
    touch(root / "a.mp4", root / "._a.mp4", root / ".trash" / "b.mp4", root / "__MACOSX" / "._a.mp4", root / "a.txt")
    (root / "folder.mp4").mkdir()
    assert names(root) == ["a.mp4"]


def test_a_broken_link_is_found_so_that_it_is_told(tmp_path):
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nothing.mp4")
    assert names(tmp_path) == ["gone.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path, caplog):
    touch(tmp_path / "a.mp4", tmp_path / "closed" / "b.mp4")
    (tmp_path / "closed").chmod(0)
    try:
        with caplog.at_level("WARNING"):
            assert names(tmp_path) == ["a.mp4"]
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert "closed is left out" in caplog.text
