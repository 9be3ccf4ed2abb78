"""Inline SVG: axes and marks. Colors are CSS classes, so that one drawing works in light, dark and print styles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420
COLORS = 8
FONT_WIDTH = 6.6  # approximate width of a character at the page's font size of 12 units


@dataclass(frozen=True)
class Scale:
    """Mapping from numbers to coordinates along one axis.

    Attributes:
        low: number at `start` (its logarithm on a log scale).
        high: number at `end` (its logarithm on a log scale).
        start: coordinate of `low`.
        end: coordinate of `high`.
        log: use a logarithmic scale.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float, *, log: bool = False, margin: float = 0.05) -> Scale:
        """Return a scale that covers all values, with a margin on both sides."""
        found = [value for value in values if math.isfinite(value) and (not log or value > 0)]
        low, high = (min(found), max(found)) if found else (1.0, 2.0)
        if log:
            low, high = math.log(low), math.log(high)
        room = (high - low) * margin or max(abs(high) * 0.05, 0.5 if high == 0 else 0.0)
        return cls(low - room, high + room, start, end, log)

    def at(self, value: float) -> float:
        """Return the coordinate of a number, clamped to the axis."""
        place = math.log(value) if self.log else value
        share = min(1.0, max(0.0, (place - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round tick values."""
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
    """Format a number with four significant digits."""
    return f"{value:.4g}"


def text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "") -> str:
    """Return a text element; `kind` is its CSS class."""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a line element."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, title: str = "", radius: float = 4.0) -> str:
    """Return a circle; `title` is its tooltip, also read by screen readers."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{inner}</circle>'


def path(points: Sequence[tuple[float, float]], kind: str, title: str = "", data: str = "") -> str:
    """Return a polyline through points; `data` holds additional attributes."""
    steps = " ".join(f"{x:.0f},{y:.1f}" for x, y in points)
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<polyline points="{steps}" class="{kind}"{data}>{inner}</polyline>'


def drawing(parts: Iterable[str], *, height: float, label: str, width: float = WIDTH) -> str:
    """Return the complete SVG; `label` is its description for screen readers."""
    body = "".join(parts)
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{body}</svg>"
    )


def x_axis(scale: Scale, bottom: float, top: float, title: str, labels: Sequence[tuple[float, str]] = ()) -> str:
    """Return the ticks, grid lines and title of the x axis."""
    ticks = labels or [(value, number(value)) for value in scale.ticks()]
    parts = [line(scale.at(value), top, scale.at(value), bottom, "rule") for value, _ in ticks]
    parts += [text(scale.at(value), bottom + 15, label, anchor="middle") for value, label in ticks]
    parts.append(text((scale.start + scale.end) / 2, bottom + 31, title, anchor="middle", kind="title"))
    return "".join(parts)


def y_axis(scale: Scale, left: float, right: float) -> str:
    """Return the ticks and grid lines of the y axis."""
    parts = []
    for value in scale.ticks(4):
        parts.append(line(left, scale.at(value), right, scale.at(value), "rule"))
        parts.append(text(left - 5, scale.at(value) + 4, number(value), anchor="end"))
    return "".join(parts)
