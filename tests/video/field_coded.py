"""Small H.264 encoder of field-coded pictures, which libx264 cannot make: macroblocks are raw or copied.

Written from ITU-T H.264, 7.3: a frame is two field pictures, each in its own unit. Macroblocks that equal those of the
last reference field of the same parity are skipped, so frames depend on earlier ones; the rest is lossless I_PCM.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

IDR, SLICE, SEQUENCE, PICTURE = 5, 1, 7, 8
FIELD_TICKS = 1500


class Writer:
    """Bit writer of one unit."""

    def __init__(self) -> None:
        self.bits: list[str] = []

    def fixed(self, value: int, count: int) -> Writer:
        self.bits.append(f"{value:0{count}b}" if count else "")
        return self

    def number(self, *values: int) -> Writer:
        """Write ue(v); se(0) and te(0) are coded alike."""
        for value in values:
            text = f"{value + 1:b}"
            self.bits.append("0" * (len(text) - 1) + text)
        return self

    def raw(self, content: bytes) -> Writer:
        """Return the bytes, padded to the next byte boundary."""
        text = "".join(self.bits)
        self.bits = [text + "0" * (-len(text) % 8), "".join(f"{byte:08b}" for byte in content)]
        return self

    def unit(self, kind: int, importance: int) -> bytes:
        text = "".join(self.bits) + "1"
        text += "0" * (-len(text) % 8)
        content = int(text, 2).to_bytes(len(text) // 8, "big")
        return b"\0\0\0\1" + bytes([importance << 5 | kind]) + _escaped(content)


def _escaped(content: bytes) -> bytes:
    out, zeros = bytearray(), 0
    for byte in content:
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def _parameters(width: int, height: int) -> bytes:
    sequence = Writer().fixed(77, 8).fixed(0, 8).fixed(40, 8).number(0, 4, 0, 4, 2).fixed(0, 1)
    sequence.number(width // 16 - 1, height // 32 - 1).fixed(0b001000, 6)
    sequence.bits[-1] = "0" + "0" + "1" + "0" + "0"
    picture = Writer().number(0, 0).fixed(0, 2).number(0, 0, 0).fixed(0, 3).number(0, 0, 0).fixed(0b100, 3)
    return sequence.unit(SEQUENCE, 3) + picture.unit(PICTURE, 3)


def _planes(picture: np.ndarray) -> list[np.ndarray]:
    frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
    return [
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width].copy()
        for plane in frame.planes
    ]


def _blocks(field: list[np.ndarray]) -> list[bytes]:
    """Return the macroblocks of a field, luma then chroma."""
    rows, columns = field[0].shape[0] // 16, field[0].shape[1] // 16
    found = []
    for row in range(rows):
        for column in range(columns):
            parts = [field[0][16 * row : 16 * row + 16, 16 * column : 16 * column + 16]]
            parts += [plane[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] for plane in field[1:]]
            found.append(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    return found


def _slice(
    blocks: list[bytes], before: list[bytes] | None, *, frame: int, bottom: bool, order: int, importance: int
) -> bytes:
    """Return a field as a slice; without `before` it is intra-coded."""
    idr = before is None and not bottom
    writer = Writer().number(0, 7 if before is None else 5, 0).fixed(frame % 256, 8).fixed(1, 1).fixed(bottom, 1)
    if idr:
        writer.number(0)
    writer.fixed(order % 256, 8)
    if before is not None:
        writer.fixed(0, 2)
    if importance:
        writer.fixed(0, 2 if idr else 1)
    writer.number(0, 1)
    skipped = 0
    for number, block in enumerate(blocks):
        if before is not None and block == before[number]:
            skipped += 1
            continue
        if before is not None:
            writer.number(skipped)
        writer.number(25 if before is None else 30).raw(block)
        skipped = 0
    if skipped:
        writer.number(skipped)
    return writer.unit(IDR if idr else SLICE, importance)


def encode_fields(pictures: list[np.ndarray], *, group: int, lonely: int = 0) -> list[tuple[bytes, bytes, bool]]:
    """Return (first field, second field, whether it is a start) of each frame.

    Args:
        pictures: RGB; width a multiple of 16, height of 32.
        group: frames between key frames.
        lonely: interval of non-reference frames; 0: none.
    """
    height, width = pictures[0].shape[:2]
    coded, before, number = [], [None, None], 0
    for place, picture in enumerate(pictures):
        key = place % group == 0
        number, before = (0, [None, None]) if key else (number, before)
        importance = 0 if lonely and place % group and place % lonely == 0 else 2
        fields = [_blocks([plane[parity::2] for plane in _planes(picture)]) for parity in (0, 1)]
        units = [
            _slice(
                fields[parity],
                before[parity],
                frame=number,
                bottom=bool(parity),
                order=2 * (place % group) + parity,
                importance=importance,
            )
            for parity in (0, 1)
        ]
        coded.append(((_parameters(width, height) if key else b"") + units[0], units[1], key))
        if importance:
            before, number = fields, number + 1
    return coded


def write_fields(path: Path, pictures: list[np.ndarray], *, group: int = 10, lonely: int = 3, second: str) -> Path:
    """Write a file of field-coded frames at 30 a second.

    Args:
        path: the suffix chooses the container.
        pictures: RGB.
        group: frames between key frames.
        lonely: as in `encode_fields`.
        second: "own": the second field has its own packet and time; "none": it has no time, and MPEG-TS is
            written with both in one packet, which FFmpeg's parser splits.
    """
    height, width = pictures[0].shape[:2]
    stream_file = path.with_suffix(".first.ts")
    with av.open(str(stream_file), "w") as writer:
        stream = writer.add_mux_stream("h264", rate=30, width=width, height=height)
        for place, (top, bottom, key) in enumerate(encode_fields(pictures, group=group, lonely=lonely)):
            for parity, content in enumerate([top, bottom] if second == "own" else [top + bottom]):
                packet = av.Packet(content)
                packet.stream, packet.time_base = stream, Fraction(1, 90000)
                packet.pts = packet.dts = 90000 + 2 * FIELD_TICKS * place + FIELD_TICKS * parity
                packet.is_keyframe = key and not parity
                writer.mux(packet)
    if path.suffix == ".ts":
        return stream_file.rename(path)
    with av.open(str(stream_file)) as reader, av.open(str(path), "w") as writer:
        reader.flags &= ~av.container.Flags.gen_pts.value
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.size:
                packet.stream = copy
                writer.mux(packet)
    return path
