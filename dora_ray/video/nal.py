"""Reading H.264's and HEVC's network abstraction layer: units, their headers' bits, and numbers in them.

Sources: ITU-T H.264, 7.3.1, 9.1, Annex B; ITU-T H.265, 7.3.1; ISO/IEC 14496-15, 5.3.3 (avcC) and 8.3.3 (hvcC).
"""

from __future__ import annotations

from collections.abc import Iterator

Packet = bytes | memoryview

START_CODE = b"\0\0\1"
ESCAPE = b"\0\0\3"
# Where the length of lengths stands in what MP4 and Matroska say of the stream.
LENGTH_PLACES = {"h264": 4, "hevc": 21}


class Bits:
    """Reads a header from its highest bit on; past the end come zeros, so nothing is read twice."""

    def __init__(self, content: bytes) -> None:
        self._value = int.from_bytes(content, "big")
        self._left = 8 * len(content)

    def __call__(self, count: int) -> int:
        """The next `count` bits as a number."""
        self._left -= count
        return (self._value >> self._left if self._left >= 0 else 0) & ((1 << count) - 1)

    def number(self) -> int:
        """An unsigned Exp-Golomb number, ue(v); 0 past the end."""
        zeros = 0
        while self._left > 0 and not self(1):
            zeros += 1
        return (1 << zeros) - 1 + self(zeros) if self._left > 0 else 0

    def signed(self) -> int:
        """A signed Exp-Golomb number, se(v)."""
        number = self.number()
        return (number + 1) // 2 if number % 2 else -(number // 2)


def length_bytes(codec: str, extradata: bytes | None) -> int:
    """Bytes of the length before every unit (MP4, Matroska), 0 where start codes divide them (MPEG-TS, AVI)."""
    place, content = LENGTH_PLACES[codec], extradata or b""
    return (content[place] & 3) + 1 if len(content) > place and content[0] == 1 else 0


def units(packet: Packet, size: int) -> Iterator[memoryview]:
    """The units of a packet, each with its header and without its length or start code.

    Args:
        packet: the packet.
        size: bytes of a length, 0 where start codes divide the units.
    """
    return _sized(memoryview(packet), size) if size else _divided(packet)


def parameter_units(codec: str, extradata: bytes | None) -> list[memoryview]:
    """The parameter sets that a container holds beside the stream."""
    content = extradata or b""
    if codec == "h264" and length_bytes(codec, content):
        return list(_configured(memoryview(content)))
    return list(units(content, 0))


def payload(unit: Packet, limit: int = 64) -> bytes:
    """The first bytes of a unit without the bytes that keep start codes out of it."""
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
    """avcC: counted sequence parameter sets, then counted picture parameter sets, each behind two bytes of length."""
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
