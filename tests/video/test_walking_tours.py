"""The ten videos by name; nothing here uses the network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from dora_ray.cli import main
from dora_ray.errors import ConfigError
from dora_ray.video.decoders import NAMES as DECODERS
from dora_ray.video.walking_tours import TOURS, download_options, fetch_tours, find_tours


def test_ten_different_videos():
    assert len({tour.video_id for tour in TOURS}) == len({tour.name for tour in TOURS}) == 10
    assert all(len(tour.video_id) == 11 and 3000 < tour.seconds < 11000 for tour in TOURS)
    assert find_tours([]) == list(TOURS)


def test_names_are_forgiving_and_unknown_ones_are_answered():
    assert [tour.name for tour in find_tours(["Chiang Mai", "venice", "KUALA_LUMPUR", "venice"])] == [
        "chiang-mai",
        "venice",
        "kuala-lumpur",
    ]
    with pytest.raises(ConfigError, match="did you mean venice"):
        find_tours(["venise"])
    with pytest.raises(ConfigError, match="choose from amsterdam"):
        find_tours(["xxxxxxx"])


def test_the_list_needs_no_network(capsys):
    assert main(["data", "fetch", "walking-tours", "venice", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "https://www.youtube.com/watch?v=fGX0Te6pFvk" in printed
    assert "1.8 h" in printed
    assert "CC BY" in printed


@pytest.mark.skipif(importlib.util.find_spec("yt_dlp") is not None, reason="yt-dlp is installed")
def test_without_yt_dlp_the_extra_is_named(tmp_path, capsys):
    assert main(["data", "fetch", "walking-tours", "venice", "--out", str(tmp_path)]) == 2
    assert "pip install 'dora-ray[fetch]'" in capsys.readouterr().err


def test_download_options(tmp_path):
    """Video only, up to the height, AV1 first, and continuing a stopped download."""
    options = download_options(tmp_path, "venice", 2160, "av01", None)
    assert (options["format"], options["format_sort"]) == ("bestvideo", ["res:2160", "fps", "vcodec:av01"])
    assert options["continuedl"]
    assert options["outtmpl"]["default"].startswith(str(tmp_path / "venice-2160."))


def test_decord_is_given_what_it_reads(tmp_path, monkeypatch):
    """Each codec has its own files, so that neither is taken for the other."""
    asked = []

    def download(library, tour, options):
        asked.append(options["format_sort"][-1])
        path = options["outtmpl"]["default"] % {"ext": "webm"}
        Path(path).write_bytes(b"x")
        return {"requested_downloads": [{"filepath": path}]}

    monkeypatch.setattr("dora_ray.video.walking_tours._library", lambda: None)
    monkeypatch.setattr("dora_ray.video.walking_tours._download", download)
    paths = [fetch_tours(find_tours(["venice"]), out=tmp_path, height=2160, decoder=name)[0] for name in DECODERS * 2]
    assert asked == ["vcodec:av01", "vcodec:vp9"]
    assert [path.name for path in paths[:3]] == ["venice-2160.webm", "venice-2160-vp9.webm", "venice-2160.webm"]
    assert paths[3:] == paths[:3]


def test_finished_downloads_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("dora_ray.video.walking_tours._library", lambda: None)
    (tmp_path / "venice-2160.webm").write_bytes(b"x")
    (tmp_path / "venice-2160.json").write_text(json.dumps({"file": "venice-2160.webm"}))
    assert fetch_tours(find_tours(["venice"]), out=tmp_path, height=2160) == [tmp_path / "venice-2160.webm"]


def test_another_height_is_fetched_into_files_of_its_own(tmp_path, monkeypatch):
    """A file of one height is neither taken for another height's nor continued as one."""
    asked = []

    def download(library, tour, options):
        asked.append(options["outtmpl"]["default"])
        return {"requested_downloads": [{"filepath": options["outtmpl"]["default"] % {"ext": "webm"}}]}

    monkeypatch.setattr("dora_ray.video.walking_tours._library", lambda: None)
    monkeypatch.setattr("dora_ray.video.walking_tours._download", download)
    for height in (720, 2160):
        fetch_tours(find_tours(["venice"]), out=tmp_path, height=height)
    assert asked == [str(tmp_path / f"venice-{height}.%(ext)s") for height in (720, 2160)]
