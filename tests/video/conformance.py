"""Conformance table: kinds of files and the result of each decoder. docs/data.md shows it; each row has a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.video import odd_videos as odd
from tests.video import videos
from tests.video.videos import NUM_FRAMES

EXACT = "exact"
OPEN = "wrong frames at open groups of pictures"
MARKS = "starts at frames that are falsely marked as key frames"
TS = "does not return from MPEG-TS files"
FIELDS = "counts the two fields of a frame as two frames"
STREAMS = "may read another one of the file's video streams"
AV1 = "has no AV1 decoder"
TIMES = "invents the times of frames that have none"
CLOCK = "does not know the times of frames if the clock goes back or times are missing"
JUMPS = "runs out of memory where the clock jumps"
LACKS = "presentation times are missing or wrong"
COUNT = "decord sees .* frames of"
ALL = range(NUM_FRAMES)


@dataclass(frozen=True)
class Kind:
    """Kind of file.

    Attributes:
        words: description in the table.
        make: writes one into a folder.
        numbers: numbers painted in the pictures of a full decode, in order.
        decord: EXACT, or part of its reason to refuse; PyAV is always exact.
        refused: part of the reason why no decoder reads the file; empty: it is read.
        warning: part of the index's warning; empty: none.
        seconds: presentation times; default: from the first number on, 30 a second.
    """

    words: str
    make: Callable[[Path], Path]
    numbers: Sequence[int] = ALL
    decord: str = EXACT
    refused: str = ""
    warning: str = ""
    seconds: Sequence[float] | None = None

    @property
    def times(self) -> np.ndarray:
        """Presentation times in seconds from the first frame."""
        if self.seconds is not None:
            return np.array(self.seconds, float)
        return (np.array(self.numbers) - self.numbers[0]) / 30


KINDS = (
    Kind("H.264, closed groups of pictures", videos.h264),
    Kind("H.264 with B frames", videos.h264_b_frames),
    Kind("H.264, open groups", videos.h264_open_groups, decord=OPEN),
    Kind("H.264, interlaced, both fields in one picture", videos.interlaced),
    *(
        Kind(
            f"H.264, interlaced, fields coded apart ({suffix[1:].upper()}, second field {words})",
            lambda folder, suffix=suffix, second=second: odd.fields(folder, suffix, second),
            decord=TS if suffix == ".ts" else FIELDS,
        )
        for suffix in (".ts", ".mp4", ".mkv")
        for second, words in (("none", "without a time"), ("own", "with its own"))
        if suffix != ".mkv" or second == "own"
    ),
    Kind("H.264, periodic intra refresh", odd.intra_refresh, decord=MARKS),
    Kind("H.264, periodic intra refresh, with B frames", lambda f: odd.intra_refresh(f, "bframes=3"), decord=MARKS),
    Kind(
        "H.264, periodic intra refresh, begun in the middle: from the first whole picture on",
        odd.intra_refresh_cut,
        range(23, NUM_FRAMES),
        decord=MARKS,
        warning="the first 18 frames come before the first key frame",
    ),
    Kind("H.264, 10 bits", videos.ten_bit),
    Kind("H.264, every sample of the MP4 marked as key frame", odd.marked_h264),
    Kind("HEVC", videos.hevc, decord=OPEN),
    Kind("HEVC, open groups", videos.open_groups_hevc, decord=OPEN),
    Kind("HEVC, open groups, begun at a CRA picture", odd.open_hevc_cut, range(10, NUM_FRAMES), decord=OPEN),
    Kind("HEVC, every sample of the MP4 marked", odd.marked_hevc, decord=OPEN),
    Kind(
        "HEVC, every block of the Matroska file marked",
        lambda f: odd.all_marked(videos.hevc(f), f / "m.mkv"),
        decord=OPEN,
    ),
    Kind("HEVC, only the first block marked", odd.unmarked_hevc, decord=OPEN),
    Kind("VP8", lambda f: odd.encode(f / "vp8.webm", codec="libvpx", options=odd.FAST_VP)),
    Kind("VP9", videos.vp9),
    Kind("VP9, hidden reference frames", odd.hidden_vp9),
    Kind("AV1", videos.av1, decord=AV1),
    Kind("AV1, pyramid of frames", videos.av1_pyramid, decord=AV1),
    Kind("MPEG-4 Part 2 in AVI", videos.mpeg4_avi),
    Kind("MPEG-4 Part 2 with B frames in AVI", odd.mpeg4_b_in_avi, decord=OPEN),
    Kind("MPEG-4 Part 2 with B frames, every sample of the MP4 marked", odd.marked_mpeg4, decord=OPEN),
    Kind("MPEG-4 Part 2 with B frames, every frame of the AVI marked", odd.marked_avi, decord=OPEN),
    Kind(
        "MPEG-2 with B frames, every block marked", lambda f: odd.marked_matroska(f, "mpeg2video", bf="2"), decord=OPEN
    ),
    Kind("MPEG-1, every block marked", lambda f: odd.marked_matroska(f, "mpeg1video")),
    Kind("DivX 3, every block marked", lambda f: odd.marked_matroska(f, "msmpeg4"), decord=MARKS),
    Kind("WMV 1 in AVI, every frame marked", lambda f: odd.marked_in_avi(f, "wmv1"), decord=MARKS),
    Kind("WMV 2 in AVI, every frame marked", lambda f: odd.marked_in_avi(f, "wmv2"), decord=MARKS),
    Kind("Sorenson H.263 in FLV, every frame marked", odd.marked_flv, decord=MARKS),
    Kind("FFV1 (decoded from its start: it is not read where its key frames are)", odd.ffv1, decord=MARKS),
    Kind("Motion JPEG", lambda f: odd.encode(f / "m.avi", codec="mjpeg", pixel_format="yuvj420p")),
    Kind("ProRes", lambda f: odd.encode(f / "p.mov", codec="prores", pixel_format="yuv422p10le")),
    Kind("MPEG-TS", videos.mpeg_ts, decord=TS),
    Kind("MPEG-TS whose 33-bit clock wraps", odd.wrapped, decord=TS),
    Kind(
        "MPEG-TS, recordings joined byte by byte: one after the other",
        odd.joined,
        [*ALL, *ALL],
        decord=TS,
        warning="its clock goes back 1 times",
        seconds=np.arange(2 * NUM_FRAMES) / 30,
    ),
    Kind(
        "MPEG-TS of MPEG-2 with open groups, three recordings joined byte by byte",
        odd.joined_open_groups,
        [*ALL, *ALL, *ALL],
        decord=TS,
        warning="its clock goes back 2 times",
        seconds=np.arange(3 * NUM_FRAMES) / 30,
    ),
    Kind(
        "MPEG-TS, two pictures a packet",
        odd.two_pictures_a_packet,
        decord=TS,
        warning=LACKS,
    ),
    Kind(
        "H.264 with B frames in AVI, which has no times for them",
        odd.h264_in_avi,
        decord=TIMES,
        warning=LACKS,
    ),
    Kind("Matroska, times before 0 not written", odd.unwritten_times, decord=TIMES, warning=LACKS),
    Kind(
        "H.264 with B frames in MXF, without times for them",
        lambda f: odd.encode(f / "v.mxf", group=10, options=odd.B_FRAMES),
        decord=TIMES,
        warning=LACKS,
    ),
    Kind(
        "H.264 with B frames in Matroska, all times those of decoding",
        lambda f: odd.times_of_decoding(f, ".mkv"),
        decord=TIMES,
        warning=LACKS,
    ),
    Kind(
        "H.264 with B frames in MP4, all times those of decoding",
        lambda f: odd.times_of_decoding(f, ".mp4", container_options={"use_editlist": "0"}),
        decord=TIMES,
        warning=LACKS,
    ),
    Kind("H.264 in MP4, some frames 100 s astray by their time alone", odd.times_astray, decord=TIMES, warning=LACKS),
    Kind(
        "VP9 in MP4, some frames 100 s astray by their time alone",
        lambda f: odd.times_astray(f, "libvpx-vp9"),
        decord=TIMES,
        warning=LACKS,
    ),
    Kind(
        "MPEG-2 with B frames in a program stream (VOB), which has times here and there",
        lambda f: odd.encode(f / "v.mpg", codec="mpeg2video", group=10, options={"bf": "2"}),
        decord=OPEN,
    ),
    Kind(
        "MPEG-1 in a program stream",
        lambda f: odd.encode(f / "v.mpg", codec="mpeg1video", group=10),
        decord=CLOCK,
    ),
    Kind("raw H.264", odd.raw_h264, refused="its frames have no timestamps"),
    Kind("variable frame rate", videos.variable_rate, seconds=videos.uneven_times().tolist()),
    Kind("MP4 with an edit list (cut without coding anew)", videos.edit_list, range(5, NUM_FRAMES), decord="edit list"),
    Kind("MP4, fragmented", odd.fragmented),
    Kind(
        "clock that jumps by years",
        odd.clock_jumps,
        decord=JUMPS,
        warning="its clock jumps by 300000000 s at 0.8 s",
        seconds=[n / 30 + 3e8 * (n >= 24) for n in ALL],
    ),
    Kind(
        "clock that jumps by years inside a group",
        odd.clock_jumps_inside,
        decord=JUMPS,
        warning="its clock jumps by 300000000 s at 1.0 s",
        seconds=[n / 30 + 3e8 * (n >= 30) for n in ALL],
    ),
    Kind(
        "clock that goes back at key frames: the parts follow each other",
        odd.clock_goes_back,
        range(300),
        decord=CLOCK,
        warning="its clock goes back 9 times",
    ),
    Kind(
        "clock that goes back inside a group",
        odd.clock_goes_back_inside,
        refused="its clock goes back by 5.000 s in the middle, 5.0 s from its start",
    ),
    Kind(
        "begun inside a group: from the first key frame on",
        odd.headless,
        range(12, NUM_FRAMES),
        decord=COUNT,
        warning="the first 7 frames come before the first key frame",
    ),
    Kind("no key frame at all", videos.no_key_frame, refused="no key frame among 8 packets"),
    Kind("odd width and height", videos.odd_size),
    Kind("turned by 90, 180 or 270 degrees", lambda f: odd.upright(f, 90)),
    Kind(
        "mirrored, and mirrored and turned",
        lambda f: odd.upright(f, 90, mirrored=True),
        decord="does not mirror pictures",
    ),
    Kind(
        "two video streams, a small one first",
        odd.proxy_first_large_default,
        decord=STREAMS,
        warning="stream 1 is used",
    ),
    Kind("a single picture before the film", odd.thumbnail_first, decord=STREAMS, warning="stream 1 is used"),
    Kind("a cover beside the film", odd.with_cover),
)


def table() -> list[str]:
    """Return the table's lines as Markdown."""
    lines = ["| kind of file | PyAV | decord |", "|---|---|---|"]
    for kind in KINDS:
        pyav = f"refused: {_plain(kind.refused)}" if kind.refused else EXACT
        decord = pyav if kind.refused else EXACT if kind.decord == EXACT else f"refused: {_plain(kind.decord)}"
        lines.append(f"| {kind.words} | {pyav} | {decord} |")
    return lines


def _plain(pattern: str) -> str:
    return pattern.replace("decord sees .* frames of", "sees another number of frames")
