"""Random access points, read from the bitstream: a container's key-frame flags are not reliable.

Some MP4s mark every sample, and some streams mark pictures that become complete only tens of frames later (periodic
intra refresh). A start is a picture that needs no earlier one, and neither does any picture shown after it. In codecs
that are not parsed here, decoding starts only at the first marked picture of the file.

Sources: ITU-T H.264, 7.4.1.2.4 and D.2.8 (recovery point); ITU-T H.265, table 7-1; ISO/IEC 14496-2, 6.2.5; ITU-T H.262,
6.3.9; RFC 6386, 9.1; VP9 bitstream, 6.2; AV1 bitstream, 5.9.2; Theora, 7.1; ITU-T H.263, 5.1; FFmpeg's decoders of
Sorenson's and Microsoft's codecs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum

from dora_ray.video.bitstream import av1_begins_anew
from dora_ray.video.nal import Bits, Packet, length_bytes, payload, units

H264_SLICE, H264_IDR, H264_SEI = 1, 5, 6
H264_SLICES = frozenset((1, 2, 5))
RECOVERY_POINT = 6
INTRA_SLICES = (2, 4)
HEVC_FIRST_RANDOM_ACCESS, HEVC_CRA, HEVC_LAST_PICTURE = 16, 21, 31
# BLA_W_LP ... BLA_N_LP; leading pictures that reference earlier ones.
HEVC_BROKEN_LINKS, HEVC_SKIPPED = range(16, 19), (8, 9)
MPEG4_PICTURE, MPEG12_PICTURE = b"\0\0\1\xb6", b"\0\0\1\0"


# Codecs of intra pictures only, which FFmpeg does not flag as such.
STILLS = frozenset(("png", "bmp", "tiff"))


class Start(IntEnum):
    """Random access at a picture."""

    NO = 0
    # Pictures that follow in the file may be shown before it and may reference earlier ones.
    OPEN = 1
    # No picture that follows is shown before, or references, any that precedes.
    CLOSED = 2


StartTest = Callable[[Packet, bool], Start]


def start_test(codec: str, extradata: bytes | None, *, intra_only: bool) -> StartTest:
    """Return a function that classifies a packet, given whether the container marks it as a key frame.

    Args:
        codec: FFmpeg's name.
        extradata: the stream's parameters as stored in the container.
        intra_only: every picture of the codec is an intra picture.
    """
    if intra_only or codec in STILLS:
        return lambda packet, marked: Start.CLOSED
    if codec in ("h264", "hevc"):
        size, judge = length_bytes(codec, extradata), (_h264 if codec == "h264" else _hevc)
        # FFmpeg's H.264 parser marks every start, and some other pictures.
        return lambda packet, marked: judge(packet, size) if marked or codec == "hevc" else Start.NO
    if codec == "av1":
        return lambda packet, marked: Start.CLOSED if marked and av1_begins_anew(packet) else Start.NO
    test = HEADER_TESTS.get(codec)
    if test is not None:
        return lambda packet, marked: test(packet)
    return _FirstMarked()


class _FirstMarked:
    """Accepts the container's first mark only, where decoding of the whole file starts anyway."""

    def __init__(self) -> None:
        self._found = False

    def __call__(self, packet: Packet, marked: bool) -> Start:
        start, self._found = marked and not self._found, self._found or marked
        return Start.CLOSED if start else Start.NO


def _h264(packet: Packet, size: int) -> Start:
    """Classify a packet: an IDR picture, or an intra picture with a recovery point that makes all later ones exact."""
    exact = False
    kinds = set()
    for unit in units(packet, size):
        kind = unit[0] & 31
        if kind == H264_IDR:
            return Start.CLOSED
        if kind == H264_SEI and not exact:
            exact = recovery_frames(unit) == 0
        elif kind in H264_SLICES:
            kinds.add(_slice_type(unit))
    return Start.OPEN if exact and kinds and kinds <= set(INTRA_SLICES) else Start.NO


def _slice_type(unit: memoryview) -> int:
    bits = Bits(payload(unit[1:], 24))
    bits.number()
    return bits.number() % 5


def recovery_wait(packet: Packet, codec: str, extradata: bytes | None) -> int:
    """Return the frames from a marked packet that is no start to its stated recovery point; 0 if it states none."""
    if codec != "h264":
        return 0
    found = [unit for unit in units(packet, length_bytes(codec, extradata)) if unit[0] & 31 == H264_SEI]
    return next((count for count in map(recovery_frames, found) if count is not None), 0)


def recovery_frames(unit: memoryview) -> int | None:
    """Return the frames until pictures are exact, from a SEI unit; None if it has no usable recovery point."""
    content = payload(unit[1:], len(unit))
    for kind, message in _messages(content):
        if kind == RECOVERY_POINT:
            bits = Bits(message)
            count, exact, broken = bits.number(), bits(1), bits(1)
            return count if exact and not broken else None
    return None


def _messages(content: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 2 < len(content):
        numbers = []
        for _ in range(2):
            total = 0
            while position < len(content) and content[position] == 255:
                total, position = total + 255, position + 1
            numbers.append(total + (content[position] if position < len(content) else 0))
            position += 1
        kind, length = numbers
        yield kind, content[position : position + length]
        position += length


def _hevc(packet: Packet, size: int) -> Start:
    kind = hevc_picture(packet, size)
    if not HEVC_FIRST_RANDOM_ACCESS <= kind <= HEVC_CRA:
        return Start.NO
    return Start.OPEN if kind == HEVC_CRA or kind in HEVC_BROKEN_LINKS else Start.CLOSED


class BrokenLinks:
    """Detects HEVC pictures that are never shown, because they reference pictures before a broken link."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        self._size = length_bytes(codec, extradata) if codec == "hevc" else None
        self._broken = False

    def skips(self, packet: Packet) -> bool:
        """Return whether this packet, the next one in the file, is never shown."""
        if self._size is None:
            return False
        kind = hevc_picture(packet, self._size)
        if HEVC_FIRST_RANDOM_ACCESS <= kind <= HEVC_CRA:
            self._broken = kind in HEVC_BROKEN_LINKS
        return self._broken and kind in HEVC_SKIPPED


def hevc_picture(packet: Packet, size: int) -> int:
    """Return the type of a packet's first slice; -1 if there is none."""
    kinds = (unit[0] >> 1 & 63 for unit in units(packet, size))
    return next((kind for kind in kinds if kind <= HEVC_LAST_PICTURE), -1)


def _after(packet: Packet, code: bytes, count: int) -> bytes:
    """Return the `count` bytes after a start code; empty if there is none."""
    content = bytes(packet)
    place = content.find(code)
    return content[place + len(code) :][:count] if place >= 0 else b""


def _mpeg4(packet: Packet) -> Start:
    header = _after(packet, MPEG4_PICTURE, 1)
    return Start.OPEN if header and header[0] >> 6 == 0 else Start.NO


def _mpeg12(packet: Packet) -> Start:
    header = _after(packet, MPEG12_PICTURE, 2)
    return Start.OPEN if len(header) == 2 and header[1] >> 3 & 7 == 1 else Start.NO


def _vp8(packet: Packet) -> Start:
    return Start.CLOSED if len(packet) and not packet[0] & 1 else Start.NO


def _vp9(packet: Packet) -> Start:
    bits = Bits(bytes(packet[:2]))
    marker, low, high = bits(2), bits(1), bits(1)
    if low and high:
        bits(1)
    shown_again, kind = bits(1), bits(1)
    return Start.CLOSED if marker == 2 and not shown_again and not kind else Start.NO


def _theora(packet: Packet) -> Start:
    return Start.CLOSED if len(packet) and not packet[0] & 0xC0 else Start.NO


def _h263(packet: Packet) -> Start:
    """Classify by the picture type: one bit, or three bits after an extended header."""
    bits = Bits(bytes(packet[:16]))
    code, _, marker, _, source = bits(22), bits(8), bits(2), bits(3), bits(3)
    extended = source == 7
    if extended and bits(3) == 1:
        bits(18)
    intra = bits(3 if extended else 1) == 0
    return Start.CLOSED if code == 32 and marker == 2 and source and intra else Start.NO


def _sorenson(packet: Packet) -> Start:
    bits = Bits(bytes(packet[:12]))
    code, _, _, size = bits(17), bits(5), bits(8), bits(3)
    bits({0: 16, 1: 32}.get(size, 0))
    return Start.CLOSED if code == 1 and bits(2) == 0 else Start.NO


def _microsoft(packet: Packet) -> Start:
    """Classify by the picture type, the first two bits."""
    return Start.CLOSED if len(packet) and not packet[0] >> 6 else Start.NO


def _wmv2(packet: Packet) -> Start:
    return Start.CLOSED if len(packet) and not packet[0] >> 7 else Start.NO


HEADER_TESTS: dict[str, Callable[[Packet], Start]] = {
    "mpeg4": _mpeg4,
    "mpeg1video": _mpeg12,
    "mpeg2video": _mpeg12,
    "vp8": _vp8,
    "vp9": _vp9,
    "theora": _theora,
    "h263": _h263,
    "flv1": _sorenson,
    "msmpeg4v2": _microsoft,
    "msmpeg4v3": _microsoft,
    "wmv1": _microsoft,
    "wmv2": _wmv2,
}
