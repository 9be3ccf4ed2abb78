"""Field-coded pictures of H.264: find the packets that hold the second field of the previous packet's frame.

Broadcasts and camcorders code the two fields of an interlaced frame separately, in two packets; the second has no
timestamp of its own, or a different one. The decoder outputs one frame, at the first field's time.

Source: ITU-T H.264, 7.3.2.1.1 (sequence parameter set), 7.3.2.2, 7.3.3 (slice header), 3.30 (complementary fields).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dora_ray.video.nal import Bits, Packet, length_bytes, parameter_units, payload, units

SLICE, IDR_SLICE, SEQUENCE_PARAMETERS, PICTURE_PARAMETERS = 1, 5, 7, 8
SLICES = frozenset((SLICE, 2, IDR_SLICE))
# Bytes searched for parameter sets in a packet with start codes.
HEAD = 4096
# Profiles whose parameter sets include the color format.
HIGH_PROFILES = frozenset((100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135))


@dataclass(frozen=True)
class _Sequence:
    """Fields that the beginning of the slice header depends on."""

    frames_only: bool
    separate_planes: bool
    frame_number_bits: int


@dataclass(frozen=True)
class _Field:
    frame_number: int
    bottom: bool


class FieldPairs:
    """Detects second fields, packet by packet in file order."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        """Read the stream's parameters.

        Args:
            codec: FFmpeg's name; only "h264" has second fields.
            extradata: the stream's parameters as stored in the container.
        """
        self._known = codec == "h264"
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, int] = {}
        self._first: _Field | None = None
        if self._known:
            self._size = length_bytes(codec, extradata)
            self._learn(parameter_units(codec, extradata))

    def is_second(self, packet: Packet) -> bool:
        """Return whether the packet completes the frame begun by the previous one."""
        if not self._known:
            return False
        # Parameters may change at any time; they precede the slices of a packet.
        self._learn(units(packet, self._size) if self._size else units(bytes(packet[:HEAD]), 0))
        return self._interlaced and self._completes(packet)

    @property
    def _interlaced(self) -> bool:
        return any(not sequence.frames_only for sequence in self._sequences.values())

    def _completes(self, packet: Packet) -> bool:
        fields = [self._field(unit) for unit in units(packet, self._size) if unit[0] & 31 in SLICES]
        found = {field for field in fields if field}
        first, self._first = self._first, None
        if len(found) != 1 or None in fields:
            return False
        (field,) = found
        if first and first.bottom != field.bottom and first.frame_number == field.frame_number:
            return True
        self._first = field
        return False

    def _field(self, unit: memoryview) -> _Field | None:
        """Return the field that a slice belongs to; None for a frame."""
        bits = Bits(payload(unit[1:], 32))
        bits.number()
        bits.number()
        sequence = self._sequences.get(self._pictures.get(bits.number(), -1))
        if sequence is None or sequence.frames_only:
            return None
        if sequence.separate_planes:
            bits(2)
        frame_number = bits(sequence.frame_number_bits)
        return _Field(frame_number, bool(bits(1))) if bits(1) else None

    def _learn(self, found: Iterable[memoryview]) -> None:
        for unit in found:
            kind = unit[0] & 31
            if kind == SEQUENCE_PARAMETERS:
                number, sequence = _read_sequence(payload(unit[1:], 512))
                self._sequences[number] = sequence
            elif kind == PICTURE_PARAMETERS:
                bits = Bits(payload(unit[1:], 16))
                self._pictures[bits.number()] = bits.number()


def _read_sequence(content: bytes) -> tuple[int, _Sequence]:
    """Return the number of a sequence parameter set, and its fields needed to parse slices."""
    bits = Bits(content)
    profile = bits(8)
    bits(16)
    number, planes = bits.number(), False
    if profile in HIGH_PROFILES:
        planes = _read_colors(bits)
    frame_number_bits = bits.number() + 4
    order = bits.number()
    if order == 0:
        bits.number()
    elif order == 1:
        bits(1)
        bits.signed()
        bits.signed()
        for _ in range(min(bits.number(), 255)):
            bits.signed()
    bits.number()
    bits(1)
    bits.number()
    bits.number()
    return number, _Sequence(bool(bits(1)), planes, frame_number_bits)


def _read_colors(bits: Bits) -> bool:
    """Skip chroma format, depths and scaling lists; return whether the color planes are coded separately."""
    chroma = bits.number()
    planes = chroma == 3 and bool(bits(1))
    bits.number()
    bits.number()
    bits(1)
    if bits(1):
        for number in range(12 if chroma == 3 else 8):
            if bits(1):
                _skip_scaling_list(bits, 16 if number < 6 else 64)
    return planes


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last
