"""Detect non-reference pictures from a few header bits, without decoding.

A picture that no other picture references can stay undecoded without changing any other, so the decoder spends its time
on references and on the frames that are wanted. Wherever a header is unusual, the picture counts as a reference: that
costs time, but never changes a pixel.

Sources: ITU-T H.264, 7.3.1 and 7.4.1 (nal_ref_idc), Annex B (start codes); ISO/IEC 14496-15, 5.3.3 (avcC); AV1
Bitstream and Decoding Process, 5.3.1 (OBU header), 5.5.1 (sequence header), 5.9.2 (frame header); AV1-ISOBMFF, 2.3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dora_ray.video.nal import START_CODE, Bits, Packet, length_bytes, units

SLICES = frozenset((1, 2, 3, 4, 5))
# Parameter sets and their extensions change how later pictures are parsed.
SEQUENCE_PARAMETERS = 7
PARAMETER_SETS = frozenset((7, 8, 13, 15))
OBU_SEQUENCE, OBU_FRAME_HEADER, OBU_FRAME, OBU_REDUNDANT_HEADER = 1, 3, 6, 7
KEY_FRAME, INTRA_ONLY, SWITCH = 0, 2, 3
SELECT = 2


def reference_test(codec: str, extradata: bytes | None) -> Callable[[Packet], bool]:
    """Return a function that tells whether other pictures may reference the one in a packet.

    Args:
        codec: FFmpeg's name; only "h264" and "av1" are parsed.
        extradata: the stream's parameters as stored in the container.
    """
    if codec == "h264":
        size = length_bytes(codec, extradata)
        return lambda packet: _h264_is_reference(packet, size)
    sequence = _sequence(extradata) if codec == "av1" else None
    return (lambda packet: _av1_is_reference(packet, sequence)) if sequence else (lambda packet: True)


def sequence_parameters(packet: Packet, codec: str, extradata: bytes | None) -> frozenset[bytes]:
    """Return the sequence parameter sets (sizes, formats) in an H.264 packet; empty for other codecs."""
    if codec != "h264":
        return frozenset()
    found = units(bytes(packet), length_bytes(codec, extradata))
    return frozenset(bytes(unit).rstrip(b"\0") for unit in found if unit[0] & 31 == SEQUENCE_PARAMETERS)


def av1_begins_anew(packet: Packet) -> bool:
    """Return whether a packet that FFmpeg marks as a key frame begins with a key frame that is shown.

    A key frame that is shown by a later packet refreshes nothing until then.
    """
    try:
        found = [content for kind, content in _units(packet) if kind in (OBU_FRAME, OBU_FRAME_HEADER)]
    except ValueError:
        return True
    bits = Bits(found[0] if found else b"\x80")
    return not bits(1) and bits(2) == KEY_FRAME and bits(1) == 1


def _h264_is_reference(packet: Packet, size: int) -> bool:
    """Return False if every slice has nal_ref_idc = 0 and the packet has no parameter set."""
    headers = list(_sized_units(packet, size) if size else _start_code_units(bytes(packet)))
    slices = [header for header in headers if header & 31 in SLICES]
    return (
        not slices
        or any(header >> 5 & 3 for header in slices)
        or any(header & 31 in PARAMETER_SETS for header in headers)
    )


def _sized_units(packet: Packet, length_bytes: int) -> Iterator[int]:
    """Yield the first byte of each NAL unit; for a unit of impossible length, that of a parameter set."""
    position = 0
    while position < len(packet):
        start = position + length_bytes
        position = start + int.from_bytes(packet[position:start], "big")
        yield packet[start] if start < position <= len(packet) else min(PARAMETER_SETS)


def _start_code_units(packet: bytes) -> Iterator[int]:
    position = packet.find(START_CODE)
    while 0 <= position < len(packet) - len(START_CODE):
        yield packet[position + len(START_CODE)]
        position = packet.find(START_CODE, position + len(START_CODE))


@dataclass(frozen=True)
class _Sequence:
    """Fields that determine the frame header's layout: 0 off, 1 on, SELECT if each frame chooses."""

    screen_content_tools: int
    integer_motion: int
    order_hint_bits: int


def _units(packet: Packet) -> Iterator[tuple[int, bytes]]:
    """Yield type and first 32 bytes of each OBU. Raises ValueError if one has no size or is truncated."""
    position = 0
    while position < len(packet):
        header = packet[position]
        if not header & 2:
            raise ValueError("an OBU without a size field")
        position += 2 if header & 4 else 1
        size = shift = 0
        more = True
        while more and position < len(packet):
            size |= (packet[position] & 127) << shift
            more = bool(packet[position] & 128)
            shift, position = shift + 7, position + 1
        if position + size > len(packet):
            raise ValueError("a truncated OBU")
        yield header >> 3 & 15, bytes(packet[position : position + min(size, 32)])
        position += size


def _sequence(extradata: bytes | None) -> _Sequence | None:
    """Return the sequence header after the four bytes of av1C; None if it is missing or uses rare features."""
    try:
        headers = [content for kind, content in _units((extradata or b"")[4:]) if kind == OBU_SEQUENCE]
    except ValueError:
        return None
    return _read_sequence(Bits(headers[0])) if headers else None


def _read_sequence(bits: Bits) -> _Sequence | None:
    """Parse 5.5.1 up to the order hint; None for still pictures, timing information and frame numbers."""
    bits(4)
    if bits(1) or bits(1):
        return None
    delays = bits(1)
    for _ in range(bits(5) + 1):
        bits(12)
        if bits(5) > 7:
            bits(1)
        if delays and bits(1):
            bits(4)
    widths = (bits(4) + 1, bits(4) + 1)
    bits(sum(widths))
    if bits(1):
        return None
    bits(3 + 4)
    has_order = bits(1)
    if has_order:
        bits(2)
    tools = SELECT if bits(1) else bits(1)
    motion = (SELECT if bits(1) else bits(1)) if tools else SELECT
    return _Sequence(tools, motion, bits(3) + 1 if has_order else 0)


def _av1_is_reference(packet: Packet, sequence: _Sequence) -> bool:
    """Return False if no frame of the packet refreshes a reference slot and the packet has no sequence header."""
    try:
        units = list(_units(packet))
    except ValueError:
        return True
    frames = [content for kind, content in units if kind in (OBU_FRAME, OBU_FRAME_HEADER)]
    others = any(kind in (OBU_SEQUENCE, OBU_REDUNDANT_HEADER) for kind, _ in units)
    return not frames or others or any(_refreshes(Bits(content), sequence) for content in frames)


def _refreshes(bits: Bits, sequence: _Sequence) -> bool:
    """Parse 5.9.2 up to refresh_frame_flags."""
    if bits(1):
        return True
    kind, shown = bits(2), bits(1)
    if not shown:
        bits(1)
    if kind == SWITCH or (kind == KEY_FRAME and shown):
        return True
    resilient = bits(1)
    bits(1)
    tools = bits(1) if sequence.screen_content_tools == SELECT else sequence.screen_content_tools
    if tools and sequence.integer_motion == SELECT:
        bits(1)
    bits(1 + sequence.order_hint_bits)
    if kind not in (INTRA_ONLY, KEY_FRAME) and not resilient:
        bits(3)
    return bits(8) != 0
