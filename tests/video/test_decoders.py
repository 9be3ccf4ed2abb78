"""One suite for every decoder: the numbers painted into the pictures come back exactly."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import av
import numpy as np
import pytest
import simplejpeg

from dora_ray.errors import ConfigError, VideoError
from dora_ray.video.decoders import NAMES, get_decoder, scaled_size
from dora_ray.video.index import index_video
from dora_ray.video.synthetic import encode_video, read_counter
from tests.video import odd_videos, videos

LIBRARIES = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}
AVAILABLE = [name for name in NAMES if importlib.util.find_spec(LIBRARIES[name])]
# Files on which decord 0.6 was seen to fail; it must be right on all others.
DECORD_REFUSES = {"h264_open_groups", "hevc", "open_groups_hevc", "av1", "av1_pyramid", "mpeg_ts"}
TORCHCODEC_REFUSES = {"mpeg_ts"}
REFUSES = {"pyav": set(), "decord": DECORD_REFUSES, "torchcodec": TORCHCODEC_REFUSES}


def numbers(decoder, index, pts, short_side=64):
    return [read_counter(frame.y) for frame in decoder.decode(index, pts, short_side=short_side)]


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("kind", sorted(videos.EXACT))
def test_every_frame_is_exact_or_the_file_is_refused(name, kind, tmp_path):
    decoder, index = get_decoder(name), index_video(str(videos.EXACT[kind](tmp_path)))
    if kind in REFUSES[name]:
        assert decoder.refusal(index)
        with pytest.raises(VideoError, match=r"use data\.decoder=pyav"):
            numbers(decoder, index, index.pts)
        return
    assert decoder.refusal(index) is None
    assert numbers(decoder, index, index.pts) == list(range(videos.NUM_FRAMES))


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("kind", sorted(videos.EXACT))
def test_segments_give_the_same_frames_as_the_whole(name, kind, tmp_path):
    if kind in REFUSES[name]:
        pytest.skip("refused")
    decoder, index = get_decoder(name), index_video(str(videos.EXACT[kind](tmp_path)))
    parts = index.segments(0.2)
    assert len(parts) > 2
    for part in parts:
        wanted = np.flatnonzero((index.pts >= part.start_pts) & (index.pts < part.stop_pts))[::3]
        frames = list(decoder.decode(index, index.pts[wanted], short_side=64))
        assert [frame.pts for frame in frames] == index.pts[wanted].tolist()
        assert [read_counter(frame.y) for frame in frames] == wanted.tolist()


def test_frames_before_an_edit_list_are_not_shown(tmp_path):
    index = index_video(str(videos.edit_list(tmp_path, hidden=5)))
    assert numbers(get_decoder("pyav"), index, index.pts) == list(range(5, videos.NUM_FRAMES))
    assert numbers(get_decoder("pyav"), index, index.pts[20:22]) == [25, 26]


@pytest.mark.skipif("decord" not in AVAILABLE, reason="decord has no wheel here")
def test_decord_refuses_edit_lists(tmp_path):
    index = index_video(str(videos.edit_list(tmp_path)))
    with pytest.raises(VideoError, match="edit list"):
        numbers(get_decoder("decord"), index, index.pts)


@pytest.mark.skipif("decord" not in AVAILABLE, reason="decord has no wheel here")
def test_decord_is_refused_open_groups_for_a_reason(tmp_path):
    """Without the refusal, decord silently returns other frames. If this test fails, the refusal can go."""
    index = index_video(str(videos.h264_open_groups(tmp_path)))
    unguarded = replace(index, leading_frames=False)
    last = index.pts[index.pts >= index.key_pts[-1]]
    expected = list(range(videos.NUM_FRAMES - len(last), videos.NUM_FRAMES))
    assert numbers(get_decoder("decord"), unguarded, last) != expected


def test_damage_leaves_frames_out_and_never_shows_wrong_ones(tmp_path):
    index = index_video(str(videos.damaged(tmp_path, first=14, count=2)))
    got = numbers(get_decoder("pyav"), index, index.pts)
    assert got == [*range(14), *range(24, videos.NUM_FRAMES)]


def test_damage_in_a_stream_that_is_renewed_bit_by_bit_ends_when_it_is_renewed(tmp_path):
    """Packet 5 is lost; the refresh that begins at packet 12 ends at 23."""
    path = odd_videos.intra_refresh(tmp_path)
    index = index_video(str(path))
    with av.open(str(path)) as reader:
        packet = [p for p in reader.demux(video=0) if p.size][5]
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place : place + size] = bytes(size)
    path.write_bytes(content)
    assert numbers(get_decoder("pyav"), index, index.pts) == [*range(5), *range(23, videos.NUM_FRAMES)]


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_never_show_wrong_frames(seed, tmp_path):
    """In these six files. H.264 has no checksums: a flip after which all still decodes cannot be noticed."""
    path = videos.h264_b_frames(tmp_path)
    content = b""
    # Once in some thousand times x264 writes other bytes, and the flips below hit other places.
    while content != path.read_bytes():
        content = path.read_bytes()
        videos.h264_b_frames(tmp_path)
    index = index_video(str(path))
    content = bytearray(content)
    rng = np.random.default_rng(seed)
    for position in rng.integers(2000, len(content) - 4000, 12):
        content[position] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    for wanted in (index.pts, index.pts[::5]):
        for frame in get_decoder("pyav").decode(index, wanted, short_side=64):
            assert read_counter(frame.y) == np.searchsorted(index.pts, frame.pts)


def test_a_change_of_size_keeps_every_frame(tmp_path):
    index = index_video(str(videos.resized(tmp_path)))
    frames = list(get_decoder("pyav").decode(index, index.pts, short_side=64))
    assert [read_counter(frame.y) for frame in frames] == list(range(videos.NUM_FRAMES))
    assert {(frame.width, frame.height) for frame in frames} == {(106, 64)}
    for name in AVAILABLE[1:]:
        with pytest.raises(VideoError, match=r"size of the pictures changes; use data\.decoder=pyav"):
            numbers(get_decoder(name), index, index.pts)


@pytest.mark.skipif("decord" not in AVAILABLE, reason="decord has no wheel here")
@pytest.mark.parametrize("codec", ["mpeg4", "libvpx-vp9", "mpeg2video"])
def test_a_change_of_size_that_the_index_cannot_see_misleads_no_decoder(codec, tmp_path):
    index = index_video(str(videos.resized(tmp_path, codec)))
    assert not index.resized
    for frame in get_decoder("pyav").decode(index, index.pts, short_side=64):
        assert read_counter(frame.y) == np.searchsorted(index.pts, frame.pts)
    if codec == "mpeg2video":
        with pytest.raises(VideoError, match=r"decord is refused: it shows neighbors .*; use data\.decoder=pyav"):
            numbers(get_decoder("decord"), index, index.pts)
    else:
        assert numbers(get_decoder("decord"), index, index.pts) == list(range(videos.NUM_FRAMES))


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("count", [2, 3])
def test_files_of_few_frames(name, count, tmp_path):
    index = index_video(str(videos.few_frames(tmp_path, count)))
    assert numbers(get_decoder(name), index, index.pts) == list(range(count))
    assert numbers(get_decoder(name), index, index.pts[-1:]) == [count - 1]


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".ts"])
def test_a_lost_end_costs_the_frames_behind_it(name, suffix, tmp_path):
    index = index_video(str(videos.truncated(tmp_path, suffix)))
    if get_decoder(name).refusal(index):
        assert name != "pyav"
        return
    got = numbers(get_decoder(name), index, index.pts)
    assert got == list(range(len(got)))
    assert 20 < len(got) >= len(index.pts) - 2


def test_a_zeroed_hole_never_shows_wrong_frames(tmp_path):
    """Overwrite a disk block with zeros, at every place of the file after its header."""
    path = videos.h264_b_frames(tmp_path)
    index, content = index_video(str(path)), path.read_bytes()
    for start in range(2000, len(content) - 6000, 4096):
        path.write_bytes(content[:start] + bytes(3000) + content[start + 3000 :])
        for frame in get_decoder("pyav").decode(index, index.pts, short_side=64):
            assert read_counter(frame.y) == np.searchsorted(index.pts, frame.pts)


def test_a_file_that_vanished_or_changed_is_an_error(tmp_path):
    path = videos.h264(tmp_path)
    index = index_video(str(path))
    other = videos.vp9(tmp_path)
    path.write_bytes(other.read_bytes())
    with pytest.raises(VideoError, match="changed after it was indexed"):
        numbers(get_decoder("pyav"), index, index.pts[15:])
    path.unlink()
    with pytest.raises(VideoError, match="no such file"):
        numbers(get_decoder("pyav"), index, index.pts)


@pytest.mark.parametrize("name", AVAILABLE)
def test_colors_survive_the_way_to_jpeg(name, tmp_path):
    """High definition is BT.709 with limited range in the file, BT.601 with full range in a JPEG."""
    colors = np.random.default_rng(0).integers(30, 226, (9, 16, 3), np.uint8)
    picture = np.kron(colors, np.ones((80, 80, 1), np.uint8))
    encoded = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
    path = tmp_path / "colors.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=30, options={"crf": "4", "preset": "ultrafast", "colorspace": "bt709"}
        )
        stream.width, stream.height = 1280, 720
        for number in range(2):
            encoded.pts = number
            container.mux(stream.encode(encoded))
        container.mux(stream.encode())
    index = index_video(str(path))
    frame = next(iter(get_decoder(name).decode(index, index.pts[:1], short_side=180)))
    seen = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg_yuv_planes(frame.y, frame.u, frame.v, 95))
    error = np.abs(seen[10::20, 10::20].astype(int) - colors)
    assert error.mean() < 2.5


@pytest.mark.parametrize("size", [(4, 2), (90, 160), (1001, 501), (512, 512), (3840, 2160), (161, 97)])
@pytest.mark.parametrize("short_side", [64, 300, 512])
def test_scaled_sizes_are_even_and_never_larger(size, short_side):
    width, height = scaled_size(*size, short_side)
    assert width % 2 == height % 2 == 0
    assert min(width, height) <= min(short_side, *size)
    assert width <= size[0]
    assert height <= size[1]
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05)


def test_a_square_counter_video_at_its_own_size(tmp_path):
    frames = videos.pictures(6, 96, 96)
    path = encode_video(tmp_path / "s.mp4", frames, frames_per_second=10, codec="libx264")
    index = index_video(str(path))
    decoded = list(get_decoder("pyav").decode(index, index.pts, short_side=512))
    assert {(f.width, f.height, *f.u.shape) for f in decoded} == {(96, 96, 48, 48)}


def test_nothing_wanted_is_nothing_decoded(tmp_path):
    index = index_video(str(videos.h264(tmp_path)))
    assert list(get_decoder("pyav").decode(index, [], short_side=64)) == []


def test_decord2_is_refused(tmp_path, monkeypatch):
    facts = tmp_path / "decord2-3.4.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: decord2\nVersion: 3.4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"decord2 3\.4\.0 is installed .*uninstall decord2 .* data\.decoder=pyav"):
        get_decoder("decord")


def test_unknown_and_missing_decoders_say_what_to_do():
    with pytest.raises(ConfigError, match="choose one of pyav, decord, torchcodec"):
        get_decoder("opencv")
    if "torchcodec" not in AVAILABLE:
        with pytest.raises(ConfigError, match=r"pip install 'dora-ray\[torchcodec\]'"):
            get_decoder("torchcodec")
