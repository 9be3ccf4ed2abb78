"""All bad files are named at once."""

from __future__ import annotations

import pytest

from dora_ray.errors import ConfigError, VideoError
from dora_ray.unreadable import report_unreadable
from tests.video import videos


def report(failures, num_files=9, *, skip=False, kind=VideoError):
    report_unreadable(failures, num_files, skip=skip, option="data.skip_unreadable", kind=kind)


def test_one_or_several_failures_are_one_error_of_the_callers_kind():
    report([])
    with pytest.raises(VideoError, match=r"^a: bad\. data\.skip_unreadable=true skips unreadable files\.$"):
        report(["a: bad"])
    with pytest.raises(ConfigError, match=r"^2 of 9 files: a: bad\. b: worse\. data\.skip_unreadable=true"):
        report(["a: bad", "b: worse."], kind=ConfigError)
    with pytest.raises(VideoError, match=r"^25 of 40 files: .* 19: bad\. And 5 more\. data"):
        report([f"{n}: bad" for n in range(25)], 40)


def test_failures_that_are_left_out_are_warned_of_unless_they_are_all(caplog):
    report(["a: bad"], skip=True)
    assert "1 of 9 files are skipped: a: bad." in caplog.text
    with pytest.raises(VideoError, match=r"^2 of 2 files: a\. b\.$"):
        report(["a", "b"], 2, skip=True)


def test_data_index_shows_the_good_videos_and_names_all_bad_ones(capsys, tmp_path):
    from dora_ray.cli import main

    good, empty, sound = videos.h264(tmp_path), videos.empty(tmp_path), videos.audio_only(tmp_path)
    assert main(["data", "index", str(tmp_path), "--json", str(tmp_path / "index.json")]) == 3
    shown = capsys.readouterr()
    assert str(good) in shown.out
    assert "2 of 3 files" in shown.err
    assert empty.name in shown.err
    assert sound.name in shown.err


def test_a_run_is_planned_without_the_videos_that_cannot_be_read(tmp_path):
    from dora_ray.config import load_config
    from dora_ray.training.launch import check_videos

    good, empty = videos.h264(tmp_path), videos.empty(tmp_path)
    given = {"videos": [str(tmp_path)], "skip_unreadable": True}
    clips = {"num_frames": 2, "stride_seconds": 0.5}
    config = load_config({"base": "tiny", "data": given, "clip": clips})
    assert [index.path for index in check_videos(config)] == [str(good)]
    with pytest.raises(VideoError, match=empty.name):
        check_videos(load_config(config.model_dump(mode="json"), "data.skip_unreadable=false"))
