"""Timeline of a video: frame times and random access points, from the file's packets in order.

N packets of a file, P that hold frames, F frames that can be shown, G starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dora_ray.errors import VideoError
from dora_ray.video.keyframes import Start
from dora_ray.video.scan import NO_TIME, Scan
from dora_ray.video.sources import UNGUESSED_ORDER

# Bound on the packets by which a picture can follow one that is shown later (H.264: 16 frames of two fields each).
REORDER_PACKETS = 64
# Bound on the frames, of two fields each, stored before one that is shown earlier.
REORDER_FRAMES = 32
# A gap of at least this length and this many frames is a clock jump rather than a pause.
JUMP_SECONDS, JUMP_FRAMES = 3600.0, 1000
MAX_BREAKS = 1000


@dataclass(frozen=True, eq=False)
class Timeline:
    """Presentation times of frames, and random access points.

    Attributes:
        pts: (F,) int64 ascending, ticks.
        key_pts: (G,) int64 ascending, ticks.
        leading: some frames are stored after a start but shown before it.
        timed: False if packets carry decoding times only: the frames decoded from a start on have these times, in
            ascending order.
        packet_times: (N,) int64 ticks: corrected times of all packets of the file, NO_TIME if absent; empty if the
            file's own presentation or decoding times are used.
        joins: numbers of the packets at which the clock goes back.
        heals: (time of a recovery point, time of the first complete frame after it); earlier damage ends there.
        lost_start: frames before the first start, which cannot be decoded.
        without_time: frames without a timestamp, left out.
        doubled: frames with the timestamp of another one, left out.
        holes: (seconds from the first frame, length in seconds) of very long gaps.
    """

    pts: NDArray[np.int64]
    key_pts: NDArray[np.int64]
    leading: bool
    timed: bool
    packet_times: NDArray[np.int64]
    joins: tuple[int, ...]
    heals: tuple[tuple[int, int], ...]
    lost_start: int
    without_time: int
    doubled: int
    holes: tuple[tuple[float, float], ...]

    @property
    def plain(self) -> bool:
        """True if every frame has its own timestamp, and times ascend."""
        return self.timed and not (self.joins or self.without_time or self.doubled)


def timeline(
    path: str, codec: str, tick: float, scan: Scan, *, in_decoder_order: bool = False, numbered: bool = False
) -> Timeline:
    """Order the frames.

    Args:
        path: the file, for messages.
        codec: FFmpeg's name.
        tick: seconds of a tick.
        scan: the packets.
        in_decoder_order: do not trust presentation times; use the decoder's output order.
        numbered: identify packets by their number, since their times depend on where reading begins.

    Raises:
        VideoError: the frames have no order, or there is no start.
    """
    places = np.flatnonzero(~scan.column("second") & ~scan.column("skipped"))
    times, starts = scan.column("pts")[places], scan.column("starts")[places]
    timed = not in_decoder_order and (codec not in UNGUESSED_ORDER or not (times == NO_TIME).any())
    if not timed:
        times, starts = scan.column("dts")[places], np.where(starts == Start.CLOSED, starts, 0)
        numbered = numbered or bool((times == NO_TIME).any())
        times = _fill(times, scan.last_duration)
    if len(times) and (times == NO_TIME).all():
        raise VideoError(
            f"{path}: its frames have no timestamps; re-encode it at the rate at which it was recorded:"
            " ffmpeg -r RATE -i IN OUT.mkv"
        )
    first, wait = _beginning(path, scan, places, starts)
    places, times, starts = places[first:], times[first:], starts[first:]
    # The first picture counts as a start even if only marked: decoding of the whole file begins there.
    starts[0] = starts[0] or Start.OPEN
    with_time, hidden = times != NO_TIME, scan.column("hidden")[places]
    places, times, starts, hidden = places[with_time], times[with_time], starts[with_time], hidden[with_time]
    step = scan.last_duration or _usual_step(times)
    breaks = _breaks(path, tick, step, times[~hidden], starts[~hidden], places[~hidden], timed=timed)
    times = times + _added(breaks, places)
    packet_times = np.full(len(scan.pts) if breaks or numbered else 0, NO_TIME)
    if len(packet_times):
        packet_times[places] = times
    starts = _still_starts(times, starts)
    shown = ~hidden & (times >= times[min(wait, len(times) - 1)])
    pts = np.unique(times[shown])
    if len(pts) < 2:
        raise VideoError(f"{path}: has {len(pts)} frame; a video needs at least 2")
    latest_start = np.maximum.accumulate(np.where(starts > 0, times, NO_TIME))
    return Timeline(
        pts=pts,
        key_pts=np.unique(times[starts > 0]),
        leading=bool(np.any((times < latest_start) & (times >= times[0]))),
        timed=timed,
        packet_times=packet_times,
        joins=tuple(packet for packet, _ in breaks),
        heals=_heals(scan, places, times) if timed else (),
        lost_start=first + wait,
        without_time=int((~with_time).sum()),
        doubled=int(shown.sum()) - len(pts),
        holes=_holes(pts, tick),
    )


def _beginning(path: str, scan: Scan, places: NDArray[np.int64], starts: NDArray[np.int8]) -> tuple[int, int]:
    """Return the first packet to decode, as an index of `places`, and the number of incomplete frames from there."""
    waits = np.array([scan.waits.get(place, 0) for place in places.tolist()], np.int64)
    marked = scan.column("marked")[places]
    for candidates in ((starts > 0) | (waits > 0), marked):
        if candidates.any():
            first = int(np.argmax(candidates))
            return first, 0 if starts[first] else int(waits[first])
    detail = f" ({scan.broken})" if scan.broken else ""
    raise VideoError(
        f"{path}: no key frame among {len(scan.pts)} packets{detail}, so it cannot be decoded; get the file again"
    )


def _heals(scan: Scan, places: NDArray[np.int64], times: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Return the recovery points of periodic intra refresh, as stated in the stream."""
    waits = [(number, scan.waits.get(place, 0)) for number, place in enumerate(places.tolist())]
    return tuple(
        (int(times[number]), int(times[number + wait])) for number, wait in waits if wait and number + wait < len(times)
    )


def _fill(times: NDArray[np.int64], step: float) -> NDArray[np.int64]:
    """Interpolate missing decoding times and extrapolate at both ends; all missing stay missing."""
    known = np.flatnonzero(times != NO_TIME)
    if not 0 < len(known) < len(times):
        return times
    numbers = np.arange(len(times))
    if len(known) > 1:
        step = float(times[known[-1]] - times[known[0]]) / float(known[-1] - known[0])
    ends = np.where(numbers < known[0], numbers - known[0], np.maximum(0, numbers - known[-1])) * step
    # Relative to the first: float64 cannot represent the ticks of a clock that began years ago.
    between = np.interp(numbers, known, (times[known] - times[known[0]]).astype(float))
    ticks: NDArray[np.int64] = np.rint(between + ends).astype(np.int64) + times[known[0]]
    return ticks


def _added(breaks: Sequence[tuple[int, int]], packets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ticks that breaks add to the times of packets, given by their numbers in the file."""
    shifts: NDArray[np.int64] = np.array([0, *(shift for _, shift in breaks)], np.int64)
    return shifts[np.searchsorted([packet for packet, _ in breaks], packets, side="right")]


def _usual_step(times: NDArray[np.int64]) -> int:
    steps = np.diff(np.unique(times))
    return int(np.median(steps)) if len(steps) else 1


def _breaks(
    path: str,
    tick: float,
    step: int,
    times: NDArray[np.int64],
    starts: NDArray[np.int8],
    places: NDArray[np.int64],
    *,
    timed: bool,
) -> list[tuple[int, int]]:
    """Return where the clock goes back: (packet number, ticks to add from there on so that time continues by `step`).

    Concatenated files restart at a start, whose group then follows the previous frames. If the clock goes back
    elsewhere, the order of the frames is unknown.
    """
    breaks: list[tuple[int, int]] = []
    times, total = times.copy(), 0
    while (place := _goes_back(times, starts, timed=timed)) is not None:
        latest = int(times[:place].max())
        if not starts[place] or not timed or len(breaks) == MAX_BREAKS:
            raise VideoError(
                f"{path}: its clock goes back by {(latest - int(times[place])) * tick:.3f} s in the middle,"
                f" {(latest - int(times[0])) * tick:.1f} s from its start, so the order of its frames is unknown;"
                " re-encode it at a constant rate: ffmpeg -i IN -vf setpts=N/RATE/TB -r RATE OUT.mkv"
            )
        following = np.flatnonzero(starts[place + 1 :])
        group = times[place : place + 1 + int(following[0])] if len(following) else times[place:]
        shift = latest + step - int(group.min())
        times[place:] += shift
        total += shift
        breaks.append((int(places[place]), total))
    return breaks


def _goes_back(times: NDArray[np.int64], starts: NDArray[np.int8], *, timed: bool) -> int | None:
    """Return the first packet that is shown before one that must precede it."""
    latest = np.maximum.accumulate(times)
    early = np.zeros(len(times), bool)
    if timed:
        behind = np.flatnonzero((times[1:] < latest[:-1]) & (starts[1:] > 0)) + 1
        early[[k for k in behind if starts[k] == Start.CLOSED or (times[:k] > times[k]).sum() > REORDER_FRAMES]] = True
    else:
        early[1:] = times[1:] <= latest[:-1]
    far = REORDER_PACKETS
    early[far:] |= times[far:] < latest[:-far]
    if not early.any():
        return None
    place = int(np.argmax(early))
    # A break at a start may become visible only at a later packet.
    near = np.arange(max(1, place - far), place + 1)
    behind = near[(starts[near] > 0) & (times[near] < latest[near - 1])]
    return int(behind[0]) if len(behind) else place


def _still_starts(times: NDArray[np.int64], starts: NDArray[np.int8]) -> NDArray[np.int8]:
    """Remove starts before which something is stored that is shown after them: their segment would lose it."""
    latest = np.maximum.accumulate(times)
    kept = starts.copy()
    kept[1:][times[1:] < latest[:-1]] = Start.NO
    return kept


def _holes(pts: NDArray[np.int64], tick: float) -> tuple[tuple[float, float], ...]:
    steps = np.diff(pts)
    longest = max(JUMP_SECONDS / tick, JUMP_FRAMES * float(np.median(steps)))
    places = np.flatnonzero(steps > longest)[:MAX_BREAKS]
    return tuple((float(pts[place] - pts[0]) * tick, float(steps[place]) * tick) for place in places.tolist())
