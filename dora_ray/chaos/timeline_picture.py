"""Picture of a timeline of nodes: a small SVG for light and dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Protocol

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 860, 320, 46, 16, 40
# Legend, followed by as many rows of event labels as needed to avoid overlaps.
LEGEND, ROW, LETTER = 18, 16, 6.2
COLORS = {"decode": "#2f7ebc", "train": "#c2571a"}


class Seen(Protocol):
    """Moment with its seconds and nodes by type."""

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""

    def count(self, kind: str) -> int:
        """Return the number of nodes of a type."""


class Line(Protocol):
    """Timeline with its moments and events."""

    @property
    def moments(self) -> Sequence[Seen]:
        """Moments in order."""

    @property
    def events(self) -> Sequence[tuple[float, str]]:
        """(seconds, description) of each event."""


def picture(timeline: Line) -> str:
    """Draw the counts of decode and train nodes over time as step curves, with events as marks."""
    ends = [moment.seconds for moment in timeline.moments] + [seconds for seconds, _ in timeline.events]
    longest = max(*ends, 1.0)
    highest = max(1, *(moment.count(kind) for moment in timeline.moments for kind in COLORS))

    def across(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / longest

    labels = _in_rows([(across(seconds), words) for seconds, words in sorted(timeline.events)])
    top = LEGEND + ROW * (2 + max((row for *_, row in labels), default=0))

    def up(count: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - top - BOTTOM) * count / highest

    parts = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(count):.1f}" y2="{up(count):.1f}" stroke="#8886"/>'
        f'<text x="{LEFT - 10}" y="{up(count) + 4:.1f}" text-anchor="end">{count}</text>'
        for count in range(highest + 1)
    ]
    step = max(10, round(longest / 8 / 10) * 10)
    parts += [
        f'<text x="{across(seconds):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{seconds} s</text>'
        for seconds in range(0, int(longest) + 1, step)
    ]
    for offset, (kind, color) in enumerate(COLORS.items()):
        path = f"M {across(0):.1f} {up(0):.1f}"
        for moment in timeline.moments:
            path += f" H {across(moment.seconds):.1f} V {up(moment.count(kind)):.1f}"
        parts.append(f'<path d="{path} H {across(longest):.1f}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts.append(f'<text x="{LEFT + 110 * offset}" y="{LEGEND}" style="fill:{color}">{kind} nodes</text>')
    for here, left, words, row in labels:
        height = LEGEND + ROW * (row + 1)
        parts.append(
            f'<line x1="{here:.1f}" x2="{here:.1f}" y1="{height}" y2="{HEIGHT - BOTTOM}" stroke="#888" '
            f'stroke-dasharray="3 4"/><text x="{left:.1f}" y="{height + 4}">{escape(words)}</text>'
        )
    style = "text{font:12px sans-serif;fill:#555}@media (prefers-color-scheme:dark){text{fill:#bbb}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Decode and train nodes over time"><style>{style}</style>{"".join(parts)}</svg>\n'
    )


def _in_rows(marks: Sequence[tuple[float, str]]) -> list[tuple[float, float, str, int]]:
    """Return mark, left end, text and row of each label, placed beside its mark in the first row with room."""
    placed: list[tuple[float, float, str, int]] = []
    ends: list[float] = []  # right end of the last label in each row
    for here, words in marks:
        width = LETTER * len(words)
        left = here + 4 if here + 4 + width < WIDTH else here - 4 - width
        row = next((row for row, end in enumerate(ends) if end + LETTER < left), len(ends))
        ends[row:] = [left + width, *ends[row + 1 :]]
        placed.append((here, left, words, row))
    return placed


def table(timeline: Line) -> str:
    """Return the timeline as a Markdown table, without moments at which no count changes."""
    lines = ["| seconds | decode nodes | train nodes | what happens |", "|---|---|---|---|"]
    shown: tuple[int, int] | None = None
    events = sorted(timeline.events)
    for moment in timeline.moments:
        counts = (moment.count("decode"), moment.count("train"))
        said = [words for seconds, words in events if seconds <= moment.seconds]
        events = events[len(said) :]
        if counts != shown or said:
            lines.append(f"| {moment.seconds:.0f} | {counts[0]} | {counts[1]} | {'; '.join(said)} |")
        shown = counts
    lines += [f"| {seconds:.0f} | | | {words} |" for seconds, words in events]
    return "\n".join(lines)
