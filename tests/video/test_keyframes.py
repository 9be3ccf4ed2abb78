"""Random access points and second fields, detected from the bits of packets."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_ray.video.fields import FieldPairs
from dora_ray.video.index import index_video
from dora_ray.video.keyframes import BrokenLinks, Start, recovery_wait, start_test
from dora_ray.video.nal import Bits, units
from tests.video import field_coded, odd_videos, videos

CODECS = ("h264", "hevc", "mpeg4", "mpeg2video", "vp8", "vp9", "av1", "theora", "h263", "flv1", "msmpeg4v3", "wmv2")
FAST = {"qscale": "3"}


def starts(path: Path) -> list[tuple[bool, Start]]:
    """Return (key frame according to FFmpeg's encoder, our classification) of every packet, all of them marked."""
    with av.open(str(path)) as reader:
        stream = reader.streams.video[0]
        context = stream.codec_context
        test = start_test(context.codec.canonical_name, context.extradata, intra_only=context.codec.intra_only)
        return [(p.is_keyframe, test(memoryview(p), True)) for p in reader.demux(stream) if p.size]


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", ".mp4"),
        ("libx264", ".ts"),
        ("libx265", ".mkv"),
        ("libx265", ".ts"),
        ("mpeg4", ".avi"),
        ("mpeg2video", ".ts"),
        ("mpeg1video", ".mpg"),
        ("libvpx", ".webm"),
        ("libvpx-vp9", ".webm"),
        ("flv", ".flv"),
        ("msmpeg4v2", ".avi"),
        ("msmpeg4", ".avi"),
        ("wmv1", ".avi"),
        ("wmv2", ".avi"),
    ],
)
def test_marks_of_honest_files_are_found_in_the_bits(codec, suffix, tmp_path):
    options = {"x265-params": odd_videos.HEVC} if codec == "libx265" else {}
    found = starts(odd_videos.encode(tmp_path / f"v{suffix}", codec=codec, group=10, options=options))
    assert [bool(start) for _, start in found] == [marked for marked, _ in found]
    assert sum(marked for marked, _ in found) == 4


def test_h263_pictures(tmp_path):
    frames = videos.pictures(20, 176, 144)
    found = starts(videos._encode(tmp_path / "v.avi", frames, codec="h263", group=10, options=FAST))
    assert [number for number, (_, start) in enumerate(found) if start] == [0, 10]


def test_open_and_closed_starts(tmp_path):
    assert {start for _, start in starts(videos.h264(tmp_path))} == {Start.NO, Start.CLOSED}
    assert [start for _, start in starts(videos.h264_open_groups(tmp_path)) if start][1:] == [Start.OPEN] * 3
    assert {start for _, start in starts(videos.open_groups_hevc(tmp_path))} == {Start.NO, Start.CLOSED, Start.OPEN}


def test_a_recovery_point_that_takes_frames_is_no_start(tmp_path):
    found = starts(odd_videos.intra_refresh(tmp_path))
    assert [number for number, (marked, _) in enumerate(found) if marked] == [0, 12, 24, 36]
    assert [number for number, (_, start) in enumerate(found) if start] == [0]
    with av.open(str(tmp_path / "refresh.mp4")) as reader:
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        extradata = reader.streams.video[0].codec_context.extradata
    assert recovery_wait(memoryview(packets[12]), "h264", extradata) == 11


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("slice_type", [0, 2, 7])
@pytest.mark.parametrize("count", [0, 3])
def test_a_recovery_point_needs_an_intra_picture_and_its_promise(exact, slice_type, count):
    message = field_coded.Writer().number(count).fixed(exact, 1).fixed(0, 3)
    text = "".join(message.bits)
    content = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    information = b"\0\0\1\x06\x06" + bytes([len(content)]) + content + b"\x80"
    picture = field_coded.Writer().number(0, slice_type, 0).fixed(0, 8).unit(1, 2)
    right = exact and slice_type in (2, 7) and not count
    test = start_test("h264", None, intra_only=False)
    assert test(information + picture, True) == (Start.OPEN if right else Start.NO)
    assert test(picture + information, True) == test(information + picture, True)
    assert test(information + picture, False) == Start.NO


def test_a_codec_that_is_not_read_starts_at_its_first_marked_picture():
    test = start_test("vc1", None, intra_only=False)
    assert [test(b"x", marked) for marked in (False, True, True)] == [Start.NO, Start.CLOSED, Start.NO]


def test_pairs_need_opposite_fields_of_one_frame(tmp_path):
    """After a lost field, the next frame's fields still pair up."""
    coded = field_coded.encode_fields(videos.pictures(8), group=8, lonely=3)
    whole, torn = FieldPairs("h264", None), FieldPairs("h264", None)
    assert [whole.is_second(field) for first, second, _ in coded for field in (first, second)] == [False, True] * 8
    fields = [field for first, second, _ in coded for field in (first, second)]
    assert [torn.is_second(field) for field in [*fields[:3], *fields[4:]]] == [
        *(False, True, False),
        *([False, True] * 6),
    ]


def test_both_fields_in_one_packet_are_a_whole(tmp_path):
    coded = field_coded.encode_fields(videos.pictures(8), group=8, lonely=3)
    pairs = FieldPairs("h264", None)
    assert not any(pairs.is_second(first + second) for first, second, _ in coded)


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
def test_every_field_pair_is_counted_once(suffix, tmp_path):
    index = index_video(str(odd_videos.fields(tmp_path, suffix, "own")))
    assert (index.field_pairs, len(index.pts), index.rules) == (True, videos.NUM_FRAMES, 2)


@settings(max_examples=300, deadline=None)
@given(packet=st.binary(max_size=120), extradata=st.binary(max_size=60), codec=st.sampled_from(CODECS))
def test_any_bytes_have_an_answer(packet, extradata, codec):
    assert start_test(codec, extradata, intra_only=False)(packet, True) in Start
    assert FieldPairs(codec, extradata).is_second(packet) in (True, False)
    assert BrokenLinks(codec, extradata).skips(packet) in (True, False)
    assert recovery_wait(packet, codec, extradata) >= 0


@given(content=st.binary(max_size=200), size=st.sampled_from([0, 1, 2, 4]))
def test_units_are_parts_of_the_packet(content, size):
    found = list(units(content, size))
    assert all(len(unit) for unit in found)
    assert sum(len(unit) for unit in found) <= len(content)


@given(values=st.lists(st.integers(0, 5000), max_size=20))
def test_numbers_come_back(values):
    text = "".join(field_coded.Writer().number(*values).bits)
    bits = Bits(int(text.ljust(-(-len(text) // 8) * 8 + 8, "1"), 2).to_bytes(-(-len(text) // 8) + 1, "big"))
    assert [bits.number() for _ in values] == values
