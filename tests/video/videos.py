"""Small test videos of every kind that has broken a loader, encoded with PyAV; each picture encodes its number."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from dora_ray.video.synthetic import encode_video, render_frames

NUM_FRAMES = 40
WIDTH, HEIGHT = 160, 96
# One thread: with several, the bytes of a file differ now and then on a busy machine.
X264 = {"preset": "veryfast", "crf": "18", "threads": "1"}


def pictures(num_frames: int = NUM_FRAMES, width: int = WIDTH, height: int = HEIGHT) -> list[np.ndarray]:
    return list(render_frames(width=width, height=height, num_frames=num_frames, seed=3))


def _encode(
    path: Path, frames: list[np.ndarray], *, codec: str = "libx264", group: int = 12, rate: float = 30, **more
) -> Path:
    more.setdefault("options", X264 if codec == "libx264" else {})
    return encode_video(path, frames, frames_per_second=rate, codec=codec, group_size=group, **more)


def h264(folder: Path) -> Path:
    return _encode(folder / "h264.mp4", pictures(), options={**X264, "bf": "0"})


def h264_b_frames(folder: Path) -> Path:
    return _encode(folder / "b_frames.mp4", pictures(), options={**X264, "bf": "3", "b_strategy": "0"})


def h264_open_groups(folder: Path) -> Path:
    """Leading B frames after each key frame: stored after it, shown before it."""
    params = "open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0"
    return _encode(folder / "open.mp4", pictures(), options={**X264, "x264-params": params})


def hevc(folder: Path) -> Path:
    options = {
        "preset": "ultrafast",
        "x265-params": "log-level=none:pools=1:frame-threads=1:keyint=10:min-keyint=10:bframes=3",
    }
    return _encode(folder / "hevc.mp4", pictures(), codec="libx265", options=options)


def ten_bit(folder: Path) -> Path:
    return _encode(folder / "ten_bit.mkv", pictures(), pixel_format="yuv420p10le")


def vp9(folder: Path) -> Path:
    return _encode(
        folder / "vp9.webm",
        pictures(),
        codec="libvpx-vp9",
        options={"deadline": "realtime", "cpu-used": "8", "crf": "20"},
    )


def av1(folder: Path) -> Path:
    return _encode(
        folder / "av1.mkv",
        pictures(),
        codec="libsvtav1",
        options={"preset": "12", "crf": "25", "svtav1-params": "lp=1"},
    )


def mpeg4_avi(folder: Path) -> Path:
    return _encode(folder / "mpeg4.avi", pictures(), codec="mpeg4", options={"qscale": "3"})


def mpeg_ts(folder: Path) -> Path:
    return _encode(folder / "stream.ts", pictures(), options={**X264, "bf": "2"})


def odd_size(folder: Path) -> Path:
    """161 x 97: the width of a 4:2:0 plane is not exactly half."""
    frames = pictures(width=161, height=97)
    return _encode(
        folder / "odd.webm", frames, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8", "crf": "20"}
    )


def variable_rate(folder: Path) -> Path:
    """Frame n is shown from uneven_times()[n] on."""
    return _encode(folder / "variable.mp4", pictures(), times=uneven_times().tolist(), options={**X264, "bf": "0"})


def uneven_times() -> np.ndarray:
    steps = np.random.default_rng(0).choice([1 / 60, 1 / 30, 0.1, 0.4], NUM_FRAMES - 1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def edit_list(folder: Path, hidden: int = 5) -> Path:
    """Like a cut with -c copy: the first `hidden` frames are needed for decoding, but not shown."""
    source, path = h264(folder), folder / "cut.mp4"
    options = {"use_editlist": "1", "movflags": "faststart", "avoid_negative_ts": "disabled"}
    with av.open(str(source)) as reader, av.open(str(path), "w", container_options=options) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        shift = round(hidden / 30 / stream.time_base)
        for packet in reader.demux(stream):
            if packet.size:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                writer.mux(packet)
    return path


def rotated(folder: Path, degrees: int) -> Path:
    """Stored rotated, with a flag that restores it: upright when displayed."""
    frames = [np.ascontiguousarray(np.rot90(picture, -degrees // 90)) for picture in pictures()]
    return _encode(folder / f"turned{degrees}.mp4", frames, rotation=degrees, options={**X264, "bf": "0"})


def audio_only(folder: Path) -> Path:
    path = folder / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    return path.rename(folder / "sound.mp4")


def picture_named_video(folder: Path) -> Path:
    path = folder / "picture.mp4"
    Image.fromarray(pictures(1)[0]).save(path, format="PNG")
    return path


def garbage(folder: Path) -> Path:
    path = folder / "garbage.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(20000))
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.touch()
    return path


def few_frames(folder: Path, count: int) -> Path:
    return _encode(folder / "few.mp4", pictures(count))


def no_key_frame(folder: Path) -> Path:
    """Recording that begins and ends inside one group of pictures."""
    source, path = mpeg4_avi(folder), folder / "headless.mkv"
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for number, packet in enumerate(reader.demux(stream)):
            if packet.size and 2 <= number < 10:
                packet.stream = copy
                writer.mux(packet)
    return path


def truncated(folder: Path, suffix: str, keep: float = 0.5, seconds: float = 4.0) -> Path:
    """First part of a file's bytes, as left by a broken download."""
    num_frames = int(seconds * 30)
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    whole = _encode(
        folder / f"whole{suffix}", pictures(num_frames), codec=codec, options={} if codec == "mpeg4" else X264
    )
    path = folder / f"truncated{suffix}"
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def damaged(folder: Path, first: int = 14, count: int = 2) -> Path:
    """H.264 file with `count` zeroed packets from number `first` on: damage in the second group of four."""
    path = h264(folder)
    with av.open(str(path)) as reader:
        packets = [(p.pos, p.size) for p in reader.demux(video=0) if p.size][first : first + count]
    content = bytearray(path.read_bytes())
    for position, size in packets:
        content[position : position + size] = bytes(size)
    path = folder / "damaged.mp4"
    path.write_bytes(content)
    return path


def resized(folder: Path, codec: str = "libx264") -> Path:
    """Half of the pictures 160 x 96, half 240 x 144, in one stream: a recording whose format was switched."""
    path, half = folder / f"resized_{codec}.mkv", NUM_FRAMES // 2
    sizes, base = ((WIDTH, HEIGHT), (WIDTH * 3 // 2, HEIGHT * 3 // 2)), Fraction(1, 30)
    with av.open(str(path), "w") as writer:
        stream = writer.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for part, (width, height) in enumerate(sizes):
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "yuv420p", base
            encoder.framerate, encoder.gop_size = 30, 10
            encoder.options = {**X264, "bf": "0"} if codec == "libx264" else {"qscale": "3"}
            for number in range(part * half, (part + 1) * half):
                frame = av.VideoFrame.from_ndarray(pictures(NUM_FRAMES, width, height)[number], "rgb24")
                frame.pts, frame.time_base = number, base
                _mux(writer, stream, encoder.encode(frame))
            _mux(writer, stream, encoder.encode(None))
    return path


def _mux(writer, stream, packets) -> None:
    for packet in packets:
        packet.stream = stream
        writer.mux(packet)


def high_dynamic_range(folder: Path) -> Path:
    """Ten bits and the transfer function PQ."""
    options = {**X264, "x264-params": "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"}
    return _encode(folder / "hdr.mkv", pictures(), pixel_format="yuv420p10le", options=options)


def named_pipe(folder: Path) -> Path:
    """Named pipe; opening it would wait for a writer forever."""
    path = folder / "pipe.mp4"
    os.mkfifo(path)
    return path


def open_groups_hevc(folder: Path) -> Path:
    """Leading pictures after each CRA key frame."""
    params = "log-level=none:pools=1:frame-threads=1:open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0"
    options = {"preset": "ultrafast", "x265-params": params}
    return _encode(folder / "open_hevc.mkv", pictures(), codec="libx265", options=options)


def interlaced(folder: Path) -> Path:
    return _encode(folder / "interlaced.mp4", pictures(), options={**X264, "x264-params": "tff=1:bframes=3:b-adapt=0"})


def av1_pyramid(folder: Path) -> Path:
    """Hierarchy of frames whose lowest layer holds non-reference pictures."""
    options = {"preset": "10", "crf": "25", "svtav1-params": "lp=1:hierarchical-levels=3:pred-struct=2"}
    return _encode(folder / "pyramid.mkv", pictures(), codec="libsvtav1", options=options)


# Each of these files shows the numbers 0 ... NUM_FRAMES - 1, upright.
EXACT: dict[str, Callable[[Path], Path]] = {
    "h264": h264,
    "h264_b_frames": h264_b_frames,
    "h264_open_groups": h264_open_groups,
    "hevc": hevc,
    "open_groups_hevc": open_groups_hevc,
    "interlaced": interlaced,
    "av1_pyramid": av1_pyramid,
    "ten_bit": ten_bit,
    "vp9": vp9,
    "av1": av1,
    "mpeg4_avi": mpeg4_avi,
    "mpeg_ts": mpeg_ts,
    "odd_size": odd_size,
    "variable_rate": variable_rate,
    "rotated_90": lambda folder: rotated(folder, 90),
    "rotated_180": lambda folder: rotated(folder, 180),
    "rotated_270": lambda folder: rotated(folder, 270),
}
