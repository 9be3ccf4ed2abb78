"""Parsing of the network abstraction layer of H.264 and HEVC: units, header bits, and Exp-Golomb numbers.

Sources: ITU-T H.264, 7.3.1, 9.1, Annex B; ITU-T H.265, 7.3.1; ISO/IEC 14496-15, 5.3.3 (avcC) and 8.3.3 (hvcC).
"""

from __future__ import annotations

from collections.abc import Iterator

Packet = bytes | memoryview

START_CODE = b"\0\0\1"
ESCAPE = b"\0\0\3"
# Offset of the length size in avcC and hvcC.
LENGTH_PLACES = {"h264": 4, "hevc": 21}


class Bits:
    """Bit reader, most significant bit first; it returns zeros past the end."""

    def __init__(self, content: bytes) -> None:
        self._value = int.from_bytes(content, "big")
        self._left = 8 * len(content)

    def __call__(self, count: int) -> int:
        """Return the next `count` bits as a number."""
        self._left -= count
        return (self._value >> self._left if self._left >= 0 else 0) & ((1 << count) - 1)

    def number(self) -> int:
        """Return an unsigned Exp-Golomb number, ue(v); 0 past the end."""
        zeros = 0
        while self._left > 0 and not self(1):
            zeros += 1
        return (1 << zeros) - 1 + self(zeros) if self._left > 0 else 0

    def signed(self) -> int:
        """Return a signed Exp-Golomb number, se(v)."""
        number = self.number()
        return (number + 1) // 2 if number % 2 else -(number // 2)


def length_bytes(codec: str, extradata: bytes | None) -> int:
    """Return the size of each unit's length prefix (MP4, Matroska); 0 if start codes separate units (MPEG-TS, AVI)."""
    place, content = LENGTH_PLACES[codec], extradata or b""
    return (content[place] & 3) + 1 if len(content) > place and content[0] == 1 else 0


def units(packet: Packet, size: int) -> Iterator[memoryview]:
    """Yield the units of a packet, each with its header and without its length prefix or start code.

    Args:
        packet: the packet.
        size: bytes of a length prefix; 0 if start codes separate the units.
    """
    return _sized(memoryview(packet), size) if size else _divided(packet)


def parameter_units(codec: str, extradata: bytes | None) -> list[memoryview]:
    """Return the parameter sets that a container stores beside the stream."""
    content = extradata or b""
    if codec == "h264" and length_bytes(codec, content):
        return list(_configured(memoryview(content)))
    return list(units(content, 0))


def payload(unit: Packet, limit: int = 64) -> bytes:
    """Return the first bytes of a unit without emulation prevention bytes."""
    return bytes(unit[:limit]).replace(ESCAPE, ESCAPE[:2])


def _sized(packet: memoryview, size: int) -> Iterator[memoryview]:
    position = 0
    while position < len(packet):
        start = position + size
        position = start + int.from_bytes(packet[position:start], "big")
        if start < min(position, len(packet)):
            yield packet[start:position]


def _divided(packet: Packet) -> Iterator[memoryview]:
    content, view = bytes(packet), memoryview(packet)
    start = content.find(START_CODE)
    while start >= 0:
        start += len(START_CODE)
        stop = content.find(START_CODE, start)
        if start < len(content) and stop != start:
            yield view[start : stop if stop >= 0 else len(content)]
        start = stop


def _configured(content: memoryview) -> Iterator[memoryview]:
    """Yield avcC's sequence parameter sets, then its picture parameter sets, each after two bytes of length."""
    position = 5
    for mask in (31, 255):
        if position >= len(content):
            return
        count, position = content[position] & mask, position + 1
        for _ in range(count):
            start = position + 2
            position = start + int.from_bytes(content[position:start], "big")
            if start < min(position, len(content)):
                yield content[start:position]
