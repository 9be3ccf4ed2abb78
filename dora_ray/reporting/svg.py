"""Inline SVG: axes and marks. Colors are classes of the page's style: one drawing serves light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420
COLORS = 8
FONT_WIDTH = 6.6  # of a character at the page's 12 units, for room beside labels


@dataclass(frozen=True)
class Scale:
    """Numbers to places along one side of a drawing.

    Attributes:
        low: number at `start`.
        high: number at `end`.
        start: place of `low`.
        end: place of `high`.
        log: equal ratios are equal distances.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float, *, log: bool = False, margin: float = 0.05) -> Scale:
        """Return a scale that holds all values, with a margin on both sides."""
        found = [value for value in values if math.isfinite(value) and (not log or value > 0)]
        low, high = (min(found), max(found)) if found else (1.0, 2.0)
        if log:
            low, high = math.log(low), math.log(high)
        room = (high - low) * margin or max(abs(high) * 0.05, 0.5 if high == 0 else 0.0)
        return cls(low - room, high + room, start, end, log)

    def at(self, value: float) -> float:
        """Return the place of a number, kept inside."""
        place = math.log(value) if self.log else value
        share = min(1.0, max(0.0, (place - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round numbers on the scale."""
        if self.log:
            return _log_ticks(math.exp(self.low), math.exp(self.high), most)
        step = (self.high - self.low) / most
        size = 10 ** math.floor(math.log10(step))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= step * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(number * step, 12) for number in range(first, int(self.high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    found = [
        digit * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in (1, 2, 5)
        if low <= digit * 10.0**power <= high
    ]
    tens = [value for value in found if str(f"{value:e}").startswith("1")]
    return tens if len(found) > most and len(tens) > 1 else found[:: max(1, math.ceil(len(found) / most))]


def number(value: float) -> str:
    """Return a number for an axis or a table, four significant digits."""
    return f"{value:.4g}"


def text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "") -> str:
    """Return a text; `kind` is a class of the page's style."""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, title: str = "", radius: float = 4.0) -> str:
    """Return a circle; its title is what a pointer or a screen reader is told."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{inner}</circle>'


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "", data: str = "") -> str:
    """Return an open line through points; `data` is more attributes."""
    steps = " ".join(f"{x:.0f},{y:.1f}" for x, y in points)
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<polyline points="{steps}" class="{kind}"{data}>{inner}</polyline>'


def drawing(parts: Iterable[str], *, height: float, label: str, width: float = WIDTH) -> str:
    """Return the whole picture; `label` says in a sentence what it shows, for those who do not see it."""
    body = "".join(parts)
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{body}</svg>"
    )


def x_axis(scale: Scale, bottom: float, top: float, title: str, labels: Sequence[tuple[float, str]] = ()) -> str:
    """Return ticks, grid and title below a drawing."""
    ticks = labels or [(value, number(value)) for value in scale.ticks()]
    parts = [line(scale.at(value), top, scale.at(value), bottom, "rule") for value, _ in ticks]
    parts += [text(scale.at(value), bottom + 15, label, anchor="middle") for value, label in ticks]
    parts.append(text((scale.start + scale.end) / 2, bottom + 31, title, anchor="middle", kind="title"))
    return "".join(parts)


def y_axis(scale: Scale, left: float, right: float) -> str:
    """Return ticks and grid at the left of a drawing."""
    parts = []
    for value in scale.ticks(4):
        parts.append(line(left, scale.at(value), right, scale.at(value), "rule"))
        parts.append(text(left - 5, scale.at(value) + 4, number(value), anchor="end"))
    return "".join(parts)
