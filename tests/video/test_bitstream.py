"""Non-reference pictures: detected from headers, and skipped without changing any other picture."""

from __future__ import annotations

from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_ray.video import pyav_decoder
from dora_ray.video.bitstream import reference_test
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import index_video
from tests.video import videos

SPARSE = {
    "h264_b_frames": videos.h264_b_frames,
    "h264_open_groups": videos.h264_open_groups,
    "h264_start_codes": videos.mpeg_ts,
    "h264_interlaced": videos.interlaced,
    "av1_pyramid": videos.av1_pyramid,
}


def marks(path) -> dict[int, bool]:
    """Return {pts: whether another picture may reference it}."""
    with av.open(str(path)) as reader:
        stream = reader.streams.video[0]
        context = stream.codec_context
        leant_on = reference_test(context.codec.canonical_name, context.extradata)
        return {packet.pts: leant_on(memoryview(packet)) for packet in reader.demux(stream) if packet.size}


def whole(index) -> dict[int, np.ndarray]:
    """Return (H, W) of each pts as decoded by FFmpeg with nothing skipped."""
    with av.open(index.path) as reader:
        return {frame.pts: frame.to_ndarray(format="gray") for frame in reader.decode(video=0)}


@pytest.mark.parametrize("kind", sorted(SPARSE))
def test_leaving_pictures_out_changes_no_other(kind, tmp_path):
    path = SPARSE[kind](tmp_path)
    index, skipped = index_video(str(path)), [pts for pts, leant_on in marks(path).items() if not leant_on]
    assert len(skipped) >= len(index.pts) / 8
    with av.open(str(path)) as reader:
        stream = reader.streams.video[0]
        packets = [p for p in reader.demux(stream) if not (p.size and p.pts in set(skipped))]
        seen = {frame.pts: frame.to_ndarray(format="gray") for packet in packets for frame in packet.decode()}
    expected = whole(index)
    assert sorted(seen) == sorted(set(expected) - set(skipped))
    for pts, picture in seen.items():
        assert np.array_equal(picture, expected[pts])


@pytest.mark.parametrize("kind", sorted(SPARSE))
def test_any_choice_of_frames_gives_the_pixels_of_the_whole(kind, tmp_path):
    index = index_video(str(SPARSE[kind](tmp_path)))
    decoder = get_decoder("pyav")
    expected = {f.pts: f.y for f in decoder.decode(index, index.pts, short_side=64)}
    assert list(expected) == index.pts.tolist()
    rng = np.random.default_rng(0)
    choices = [index.pts[::10], index.pts[3::7], *(np.sort(rng.choice(index.pts, 5, replace=False)) for _ in range(6))]
    for wanted in choices:
        frames = list(decoder.decode(index, wanted, short_side=64))
        assert [frame.pts for frame in frames] == wanted.tolist()
        assert all(np.array_equal(frame.y, expected[frame.pts]) for frame in frames)


@pytest.mark.parametrize("kind", sorted(SPARSE))
def test_unneeded_pictures_are_not_decoded(kind, tmp_path, monkeypatch):
    path, decoded, sound_frames = SPARSE[kind](tmp_path), [], pyav_decoder._sound_frames

    def noted(packets):
        for packet in packets:
            decoded.extend([packet.pts] if packet.size else [])
            yield packet

    monkeypatch.setattr(
        pyav_decoder, "_sound_frames", lambda packets, keys, **more: sound_frames(noted(packets), keys, **more)
    )
    index, leant_on = index_video(str(path)), marks(path)
    wanted = index.pts[[0, len(index.pts) // 2, -1]]
    assert len(list(get_decoder("pyav").decode(index, wanted, short_side=64))) == 3
    assert decoded == [pts for pts in leant_on if leant_on[pts] or pts in wanted]
    assert len(decoded) <= len(leant_on) * 7 / 8 + len(wanted)


@pytest.mark.parametrize("kind", ["h264_b_frames", "h264_open_groups", "h264_start_codes"])
def test_h264_marks_are_those_that_ffmpeg_goes_by(kind, tmp_path):
    path = SPARSE[kind](tmp_path)
    with av.open(str(path)) as reader:
        stream = reader.streams.video[0]
        stream.codec_context.skip_frame = "NONREF"
        decoded = [frame.pts for frame in reader.decode(stream)]
    assert sorted(pts for pts, leant_on in marks(path).items() if leant_on) == decoded


@pytest.mark.parametrize("kind", ["vp9", "hevc", "mpeg4_avi"])
def test_other_codecs_leave_nothing_out(kind, tmp_path):
    assert all(marks(videos.EXACT[kind](tmp_path)).values())


@settings(max_examples=300, deadline=None)
@given(packet=st.binary(max_size=80), configuration=st.binary(max_size=40), codec=st.sampled_from(["h264", "av1"]))
def test_any_bytes_have_an_answer(packet, configuration, codec):
    assert reference_test(codec, configuration)(packet) in (True, False)


def test_unusual_headers_count_as_references(tmp_path):
    """A truncated packet, one with a parameter set, and one without any unit."""
    size = (5).to_bytes(4, "big")
    leant_on = reference_test("h264", b"\x01\x64\x00\x34\xff")
    lonely = size + b"\x01" + bytes(4)
    assert not leant_on(lonely)
    assert not leant_on(lonely + lonely)
    for doubtful in (b"", lonely[:-1], lonely + b"\0\0", size + b"\x67" + bytes(4) + lonely, size + b"\x06" + bytes(4)):
        assert leant_on(doubtful)
    assert leant_on(lonely + size + b"\x21" + bytes(4))
    assert all(a <= b for a, b in pairwise([leant_on(lonely), leant_on(size + b"\x41" + bytes(4))]))
