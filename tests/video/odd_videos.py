"""Videos that mislead loaders, with false marks, times, fields, streams and orientations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.video import field_coded, videos
from tests.video.videos import NUM_FRAMES, X264, pictures

Change = Callable[[int, av.Packet], bool | None]
HEVC = "log-level=none:pools=1:frame-threads=1:keyint=10:min-keyint=10:bframes=3"
B_FRAMES = {**X264, "bf": "3", "b_strategy": "0"}
FAST_VP = {"deadline": "realtime", "cpu-used": "8", "crf": "20"}
ONE, LAST = 1 << 16, 1 << 30
# Matrix (a, b, c, d) of each orientation, and ffmpeg's transform of the stored picture.
ORIENTATIONS: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "as_stored": ((1, 0, 0, 1), lambda p: p),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside_down_mirrored": ((1, 0, 0, -1), lambda p: p[::-1]),
    "turned_180": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "turned_90": ((0, -1, 1, 0), np.rot90),
    "turned_270": ((0, 1, -1, 0), lambda p: np.rot90(p, 3)),
    "transposed": ((0, 1, 1, 0), lambda p: np.swapaxes(p, 0, 1)),
    "transposed_other_way": ((0, -1, -1, 0), lambda p: np.swapaxes(p[::-1, ::-1], 0, 1)),
}


def encode(path: Path, *, codec: str = "libx264", num_frames: int = NUM_FRAMES, **more) -> Path:
    return videos._encode(path, pictures(num_frames), codec=codec, **more)


def remux(source: Path, target: Path, change: Change | None = None, **options) -> Path:
    """Copy the packets; `change` may alter each, given its number, and returns False to drop it."""
    with av.open(str(source)) as reader, av.open(str(target), "w", **options) as writer:
        reader.flags &= ~av.container.Flags.gen_pts.value
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for number, packet in enumerate(reader.demux(stream)):
            if packet.size and (change is None or change(number, packet) is not False):
                packet.stream = copy
                writer.mux(packet)
    return target


def shifted(source: Path, target: Path, by_seconds: Callable[[int], float], **options) -> Path:
    """Copy a file, showing packet n `by_seconds(n)` later."""

    def change(number: int, packet: av.Packet) -> None:
        ticks = round(by_seconds(number) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks

    return remux(source, target, change, **options)


def without_sync_table(path: Path) -> Path:
    """Remove the list of sync samples from an MP4, so that every sample counts as one."""
    content = path.read_bytes()
    assert content.count(b"stss") == 1
    path.write_bytes(content.replace(b"stss", b"free"))
    return path


def all_marked(source: Path, target: Path) -> Path:
    def mark(number: int, packet: av.Packet) -> None:
        packet.is_keyframe = True

    return remux(source, target, mark)


def hevc(path: Path, params: str = HEVC) -> Path:
    return encode(path, codec="libx265", options={"preset": "ultrafast", "x265-params": params})


def mpeg4(path: Path) -> Path:
    return encode(path, codec="mpeg4", options={"qscale": "3", "bf": "2"})


def marked_mpeg4(folder: Path) -> Path:
    return without_sync_table(mpeg4(folder / "marked_mpeg4.mp4"))


def marked_hevc(folder: Path) -> Path:
    return without_sync_table(hevc(folder / "marked_hevc.mp4"))


def marked_h264(folder: Path) -> Path:
    return without_sync_table(videos.h264_b_frames(folder))


def marked_matroska(folder: Path, codec: str, **options: str) -> Path:
    return all_marked(encode(folder / "plain.mkv", codec=codec, options=options), folder / f"marked_{codec}.mkv")


def marked_in_avi(folder: Path, codec: str) -> Path:
    return all_marked(
        encode(folder / "plain.avi", codec=codec, options={"qscale": "3"}), folder / f"marked_{codec}.avi"
    )


def marked_flv(folder: Path) -> Path:
    """Mark every frame as a key frame, in the high bits of each tag's first byte."""
    plain = encode(folder / "plain.flv", codec="flv", options={"qscale": "3"})
    content = bytearray(plain.read_bytes())
    position = 13
    while position < len(content):
        size = int.from_bytes(content[position + 1 : position + 4], "big")
        if content[position] == 9:
            content[position + 11] = 1 << 4 | content[position + 11] & 15
        position += 15 + size
    plain.write_bytes(content)
    return plain


def ffv1(folder: Path) -> Path:
    return encode(folder / "ffv1.mkv", codec="ffv1")


def hidden_vp9(folder: Path) -> Path:
    """Alternate reference frames are stored with the preceding picture and are never shown."""
    options = {"deadline": "good", "cpu-used": "5", "crf": "20", "auto-alt-ref": "1", "lag-in-frames": "12"}
    return encode(folder / "hidden.webm", codec="libvpx-vp9", options=options)


def marked_avi(folder: Path) -> Path:
    return all_marked(mpeg4(folder / "plain.avi"), folder / "marked.avi")


def unmarked_hevc(folder: Path) -> Path:
    """Mark only the first sample, although there is a start every ten frames."""

    def mark(number: int, packet: av.Packet) -> None:
        packet.is_keyframe = number == 0

    return remux(hevc(folder / "plain.mkv"), folder / "unmarked.mkv", mark)


def intra_refresh(folder: Path, more: str = "bframes=0") -> Path:
    """One IDR picture, then periodic intra refresh: columns of macroblocks are renewed in turn."""
    frames = pictures(NUM_FRAMES, 320, 192)
    options = {**X264, "x264-params": f"intra-refresh=1:keyint=12:{more}"}
    return videos._encode(folder / "refresh.mp4", frames, options=options)


def intra_refresh_cut(folder: Path) -> Path:
    """Recording of such a stream begun in the middle: the first complete picture comes after the second refresh."""
    return remux(intra_refresh(folder), folder / "refresh_cut.mkv", lambda number, packet: number >= 5)


def open_hevc_cut(folder: Path) -> Path:
    """File that begins at a CRA picture, whose leading pictures cannot be decoded and are not shown."""
    return remux(
        videos.open_groups_hevc(folder), folder / "cut.mkv", lambda number, packet: number >= cra_packet(folder)
    )


def cra_packet(folder: Path) -> int:
    with av.open(str(folder / "open_hevc.mkv")) as reader:
        keys = [number for number, packet in enumerate(reader.demux(video=0)) if packet.size and packet.is_keyframe]
    return keys[1]


def broken_link_hevc(folder: Path) -> Path:
    """Rename every CRA picture to BLA, so that its leading pictures are never shown."""
    plain = videos.open_groups_hevc(folder)
    path = folder / "broken_link.mkv"
    with av.open(str(plain)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            content = bytearray(bytes(packet))
            position = 0
            while position < len(content):
                size = int.from_bytes(content[position : position + 4], "big")
                if content[position + 4] >> 1 & 63 == 21:
                    content[position + 4] = 16 << 1 | content[position + 4] & 129
                position += 4 + size
            if content:
                changed = av.Packet(bytes(content))
                changed.stream, changed.time_base = copy, packet.time_base
                changed.pts, changed.dts, changed.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
                writer.mux(changed)
    return path


def h264_in_avi(folder: Path) -> Path:
    return encode(folder / "b_frames.avi", options={**X264, "bf": "3", "b_strategy": "0"})


def mpeg4_b_in_avi(folder: Path) -> Path:
    return mpeg4(folder / "b_frames_mpeg4.avi")


def two_pictures_a_packet(folder: Path) -> Path:
    """MPEG-TS in which every second picture has no time, because two share a packet of the elementary stream."""
    source, path = videos.mpeg_ts(folder), folder / "pairs.ts"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_mux_stream("h264", rate=30, width=videos.WIDTH, height=videos.HEIGHT)
        packets = [packet for packet in reader.demux(stream) if packet.size]
        for first, second in zip(packets[::2], packets[1::2], strict=True):
            both = av.Packet(bytes(first) + bytes(second))
            both.stream, both.time_base, both.is_keyframe = copy, first.time_base, first.is_keyframe
            both.pts, both.dts = first.pts, first.dts
            writer.mux(both)
    return path


def raw_h264(folder: Path) -> Path:
    return remux(videos.mpeg_ts(folder), folder / "raw.h264", format="h264")


def clock_jumps(folder: Path, suffix: str = ".mkv", seconds: float = 3e8) -> Path:
    """Advance the clock by years from frame 24, a key frame, on."""
    return shifted(videos.h264(folder), folder / f"jump{suffix}", lambda number: seconds * (number >= 24))


def clock_jumps_inside(folder: Path) -> Path:
    """Advance the clock by years in the middle of a group of pictures."""
    return shifted(videos.h264(folder), folder / "jump_inside.mkv", lambda number: 3e8 * (number >= 30))


def with_clusters_at(source: Path, path: Path, milliseconds: Callable[[int], int]) -> Path:
    """Write a Matroska file with changed cluster times."""
    content = bytearray(source.read_bytes())
    for number, match in enumerate(re.finditer(b"\x1f\x43\xb6\x75", bytes(content))):
        time = content.index(b"\xe7", match.start())
        size = content[time + 1] & 127
        content[time + 2 : time + 2 + size] = milliseconds(number).to_bytes(size, "big")
    path.write_bytes(content)
    return path


def clock_goes_back(folder: Path, codec: str = "libvpx-vp9", num_frames: int = 300, group: int = 30) -> Path:
    """Restart the clock at the second cluster, 5 s later."""
    plain = encode(folder / "plain.mkv", codec=codec, num_frames=num_frames, group=group)
    return with_clusters_at(plain, folder / "back.mkv", lambda number: 0)


def clock_goes_back_inside(folder: Path) -> Path:
    """Clock that goes back away from a key frame."""
    return clock_goes_back(folder, group=1000)


def times_of_decoding(folder: Path, suffix: str, **options) -> Path:
    """B frames stamped with decoding times, by a muxer without presentation times."""

    def change(number: int, packet: av.Packet) -> None:
        packet.pts = packet.dts

    return remux(videos.h264_b_frames(folder), folder / f"times_of_decoding{suffix}", change, **options)


def times_astray(folder: Path, codec: str = "libx264") -> Path:
    """Show frames 10 to 20 a hundred seconds late, according to their presentation times only."""

    def change(number: int, packet: av.Packet) -> None:
        if 10 <= number <= 20:
            packet.pts += round(100 / packet.time_base)

    options = {**X264, "bf": "0"} if codec == "libx264" else FAST_VP
    return remux(encode(folder / "plain.mp4", codec=codec, options=options), folder / "astray.mp4", change)


def joined(folder: Path) -> Path:
    """Two concatenated MPEG-TS recordings, like the MTS files of cameras."""
    path = folder / "joined.ts"
    path.write_bytes(videos.mpeg_ts(folder).read_bytes() * 2)
    return path


def joined_open_groups(folder: Path) -> Path:
    part = encode(folder / "part.ts", codec="mpeg2video", group=10, options={"bf": "2"})
    path = folder / "joined.ts"
    path.write_bytes(part.read_bytes() * 3)
    return path


def wrapped(folder: Path) -> Path:
    """MPEG-TS whose 33-bit timestamps wrap around after 20 frames."""
    seconds = (2**33 - 90000 * 20 // 30) / 90000
    plain = encode(folder / "plain.mp4", options={**X264, "bf": "2"})
    options = {"mpegts_copyts": "1", "muxdelay": "0"}
    return shifted(plain, folder / "wrapped.ts", lambda number: seconds, container_options=options)


def unwritten_times(folder: Path) -> Path:
    """Matroska cannot store negative times, so the first half of the frames has none."""
    more = {"container_options": {"avoid_negative_ts": "disabled"}}
    return shifted(videos.h264_b_frames(folder), folder / "unwritten.mkv", lambda number: -0.5, **more)


def fragmented(folder: Path) -> Path:
    options = {"movflags": "frag_keyframe+empty_moov"}
    return remux(videos.h264_b_frames(folder), folder / "fragmented.mp4", container_options=options)


def headless(folder: Path, codec: str = "libx264", suffix: str = ".mkv") -> Path:
    """File that begins inside a group of pictures: the first complete picture is number 12."""
    options = {**X264, "bf": "0"} if codec == "libx264" else {}
    plain = encode(folder / f"plain_{codec}.mkv", codec=codec, options=options)
    return remux(plain, folder / f"headless_{codec}{suffix}", lambda number, packet: number >= 5)


def doubled_times(folder: Path) -> Path:
    """Frame 7 has the timestamp of frame 6."""

    def change(number: int, packet: av.Packet) -> None:
        if number == 7:
            packet.pts = packet.dts = packet.pts - packet.duration

    return remux(videos.vp9(folder), folder / "doubled.mkv", change)


def with_matrix(source: Path, path: Path, matrix: tuple[int, int, int, int]) -> Path:
    a, b, c, d = (number * ONE for number in matrix)
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        copy.set_display_matrix([a, b, 0, c, d, 0, 0, 0, LAST])
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
    return path


def oriented(folder: Path, name: str) -> Path:
    return with_matrix(videos.h264(folder), folder / f"{name}.mp4", ORIENTATIONS[name][0])


def upright(folder: Path, degrees: int, *, mirrored: bool = False) -> Path:
    """File with rotated (and mirrored) stored pictures and the matrix that restores them."""
    shown = pictures()
    stored = [np.rot90(picture, -degrees // 90) for picture in shown]
    stored = [np.ascontiguousarray(picture[:, ::-1] if mirrored else picture) for picture in stored]
    plain = videos._encode(folder / "stored.mp4", stored, options={**X264, "bf": "0"})
    turns = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}
    a, b, c, d = turns[degrees]
    return with_matrix(plain, folder / "upright.mp4", (-a, -b, c, d) if mirrored else (a, b, c, d))


def streams(path: Path, *sources: Path) -> Path:
    """Merge the video streams of several files into one."""
    readers = [av.open(str(source)) for source in sources]
    with av.open(str(path), "w") as writer:
        copies = [writer.add_stream_from_template(reader.streams.video[0]) for reader in readers]
        for reader, copy in zip(readers, copies, strict=True):
            for packet in reader.demux(reader.streams.video[0]):
                if packet.size:
                    packet.stream = copy
                    writer.mux(packet)
            reader.close()
    return path


def small(folder: Path, num_frames: int = NUM_FRAMES) -> Path:
    """Proxy stream of 80 x 48."""
    return videos._encode(folder / "proxy.mp4", pictures(num_frames, 80, 48))


def proxy_first_large_default(folder: Path) -> Path:
    """Two streams, both marked as default in Matroska."""
    return proxy_first(folder, ".mkv")


def proxy_first(folder: Path, suffix: str = ".mp4") -> Path:
    return streams(folder / f"proxy_first{suffix}", small(folder), videos.h264(folder))


def thumbnail_first(folder: Path) -> Path:
    """Single picture, larger than the film and not marked as its cover."""
    still = videos._encode(folder / "still.mp4", pictures(1, 320, 192))
    return streams(folder / "thumbnail_first.mp4", still, videos.h264(folder))


def with_cover(folder: Path) -> Path:
    path = folder / "cover.mp4"
    with av.open(str(videos.h264(folder))) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        cover = writer.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 640, 384, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        copy = writer.add_stream_from_template(stream)
        frame = av.VideoFrame.from_ndarray(pictures(1, 640, 384)[0], "rgb24").reformat(format="yuvj420p")
        frame.pts, frame.time_base = 0, Fraction(1, 30)
        for packet in [*cover.encode(frame), *cover.encode()]:
            writer.mux(packet)
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
    return path


def fields(folder: Path, suffix: str, second: str) -> Path:
    return field_coded.write_fields(folder / f"fields_{second}{suffix}", pictures(), second=second)


def packets(path: Path) -> Iterator[av.Packet]:
    with av.open(str(path)) as reader:
        yield from (packet for packet in reader.demux(video=0) if packet.size)
