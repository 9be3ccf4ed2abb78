"""Charts of a sweep's page: intervals, interaction heat maps, cost against quality, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_ray.reporting import svg
from dora_ray.reporting.svg import WIDTH, Scale, number

ROW, STACKED_ROW, LEGEND_ROW = 22, 38, 18
LABEL_SHARE = 0.42


@dataclass(frozen=True)
class Bar:
    """One row of an interval chart.

    Attributes:
        label: text beside the row.
        value: the estimate.
        half: half width of the interval over seeds; may be infinite.
        outer: half width of the interval over test images; 0 without one.
        kind: CSS class of the mark.
        random: figure of random encoders with the same settings, where each line has its own.
        chance: likewise of guessing.
    """

    label: str
    value: float
    half: float
    outer: float = 0.0
    kind: str = "c0"
    random: float | None = None
    chance: float | None = None


def intervals(
    bars: Sequence[Bar], *, title: str, label: str, references: Sequence[tuple[str, float]] = (), zero: bool = False
) -> str:
    """Draw estimates with their intervals, one below the other, and labeled reference lines."""
    longest = max((len(bar.label) for bar in bars), default=0) * svg.FONT_WIDTH + 8
    # Labels that are too long to fit beside the bars go above them.
    stacked = longest > WIDTH * LABEL_SHARE
    left, row = (4.0, STACKED_ROW) if stacked else (longest, ROW)
    own = _legend_of_own_marks(bars)
    top = 6 + LEGEND_ROW * (len(references) + bool(own))
    ends = [end for bar in bars for half in (bar.half, bar.outer) for end in (bar.value - half, bar.value + half)]
    marks = [value for bar in bars for value in (bar.value, bar.random, bar.chance) if value is not None]
    values = [*(end for end in ends if math.isfinite(end)), *marks, *(value for _, value in references)]
    scale = Scale.of([*values, *([0.0] if zero else [])], left + 6, WIDTH - 10)
    bottom = top + row * len(bars)
    parts = [svg.x_axis(scale, bottom, top, title), own]
    if zero:
        parts.append(svg.line(scale.at(0), top, scale.at(0), bottom, "zero"))
    for index, (name, value) in enumerate(references):
        x, y = scale.at(value), 6 + LEGEND_ROW * (index + bool(own))
        middle = x < (left + WIDTH) / 2
        parts.append(svg.line(x, y, x, bottom, "reference"))
        shown = f"{name} {number(value)}"
        parts.append(svg.text(x + (4 if middle else -4), y + 11, shown, anchor="start" if middle else "end"))
    for index, bar in enumerate(bars):
        height = top + row * (index + (0.75 if stacked else 0.5))
        if stacked:
            # Lines that cross the drawing would strike the label through.
            wide = min(WIDTH - left, len(bar.label) * svg.FONT_WIDTH)
            parts.append(f'<rect x="{left}" y="{height - 22:.1f}" width="{wide:.0f}" height="15" class="ground"/>')
            parts.append(svg.text(left, height - 10, bar.label))
        else:
            parts.append(svg.text(left, height + 4, bar.label, anchor="end"))
        parts += _draw_bar(bar, scale, height)
    return svg.drawing(parts, height=bottom + 38, label=label)


def _draw_bar(bar: Bar, scale: Scale, y: float) -> list[str]:
    """The marks of one line: chance and random encoders of its own, intervals, the estimate."""
    parts = []
    if bar.chance is not None:
        said = f"{bar.label}: chance {number(bar.chance)}"
        parts.append(svg.path([(scale.at(bar.chance), y - 5), (scale.at(bar.chance), y + 7)], "tick", said))
    if bar.outer:
        ends = scale.at(bar.value - bar.outer), scale.at(bar.value + bar.outer)
        parts.append(svg.line(ends[0], y, ends[1], y, f"outer {bar.kind}"))
    if math.isfinite(bar.half):
        ends = scale.at(bar.value - bar.half), scale.at(bar.value + bar.half)
        parts.append(svg.line(ends[0], y, ends[1], y, f"inner {bar.kind}"))
    if bar.random is not None:
        said = f"{bar.label}: random encoder {number(bar.random)}"
        parts.append(svg.dot(scale.at(bar.random), y, "ring", said))
    parts.append(svg.dot(scale.at(bar.value), y, f"mark {bar.kind}", f"{bar.label}: {_with(bar)}"))
    return parts


def _legend_of_own_marks(bars: Sequence[Bar]) -> str:
    """Return the legend of rings and strokes; empty if no line has its own."""
    parts, x = [], 10.0
    for name, there in (("random encoder", "random"), ("chance", "chance")):
        if any(getattr(bar, there) is not None for bar in bars):
            parts.append(svg.dot(x, 13, "ring") if there == "random" else svg.path([(x, 6), (x, 20)], "tick"))
            parts.append(svg.text(x + 9, 17, f"{name}, of each"))
            x += 30 + len(name + ", of each") * svg.FONT_WIDTH
    return "".join(parts)


def _with(bar: Bar) -> str:
    return f"{number(bar.value)} ± {number(bar.half)}" if math.isfinite(bar.half) else number(bar.value)


def heat_map(cells: Mapping[tuple[Any, Any], float], *, rows: str, columns: str, metric: str) -> str:
    """Draw a heat map of the mean for each pair of values of two factors, with the number in each cell."""
    firsts, seconds = (ordered([pair[index] for pair in cells]) for index in (0, 1))
    low, high = min(cells.values()), max(cells.values())
    left = min(WIDTH * 0.3, max(len(_word(value)) for value in firsts) * svg.FONT_WIDTH + 12)
    width, top = (WIDTH - left - 4) / len(seconds), 22
    tall = 34
    parts = [svg.text(0, 14, rows.rsplit(".", 1)[-1], kind="title")]
    for index, value in enumerate(firsts):
        y = top + tall * index
        parts.append(svg.text(left - 6, y + tall / 2 + 4, _word(value), anchor="end"))
        for place, other in enumerate(seconds):
            if (value, other) not in cells:
                continue
            mean = cells[value, other]
            shade = (mean - low) / (high - low) if high > low else 0.5
            x = left + width * place
            inside = f'fill-opacity="{0.06 + 0.36 * shade:.2f}"'
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="{tall - 2}" class="cell" {inside}/>'
            )
            parts.append(svg.text(x + width / 2 - 1, y + tall / 2 + 4, number(mean), anchor="middle"))
    bottom = top + tall * len(firsts)
    for place, other in enumerate(seconds):
        parts.append(svg.text(left + width * (place + 0.5), bottom + 14, _word(other), anchor="middle"))
    parts.append(svg.text((left + WIDTH) / 2, bottom + 30, columns.rsplit(".", 1)[-1], anchor="middle", kind="title"))
    said = f"Mean {metric} by {rows} (down) and {columns} (across), from {number(low)} to {number(high)}."
    return svg.drawing(parts, height=bottom + 38, label=said)


@dataclass(frozen=True)
class Costed:
    """A point's cost and figure.

    Attributes:
        label: what it is.
        cost: its cost.
        value: the figure.
        half: half width of the figure's interval; may be infinite.
        front: whether no other beats it in both.
    """

    label: str
    cost: float
    value: float
    half: float
    front: bool


def cost_and_quality(points: Sequence[Costed], *, metric: str, cost: str) -> str:
    """Draw each point's cost and metric; connect the Pareto front and number it from the cheapest point."""
    ends = [end for point in points for end in (point.value - point.half, point.value + point.half)]
    costs = Scale.of((point.cost for point in points), 52, WIDTH - 10)
    values = Scale.of([*(end for end in ends if math.isfinite(end)), *(point.value for point in points)], 216, 10)
    parts = [svg.y_axis(values, 52, WIDTH - 10), svg.x_axis(costs, 216, 10, cost)]
    front = front_of(points)
    parts.append(svg.path([(costs.at(point.cost), values.at(point.value)) for point in front], "front"))
    for point in points:
        x, y, color = costs.at(point.cost), values.at(point.value), "c1" if point.front else "c0"
        if math.isfinite(point.half):
            ends = [values.at(point.value - point.half), values.at(point.value + point.half)]
            parts.append(svg.line(x, ends[0], x, ends[1], f"outer {color} pale"))
        said = f"{point.label}: {number(point.value)} for {number(point.cost)}"
        parts.append(svg.dot(x, y, f"mark {color}" if point.front else f"mark {color} pale", said))
    for index, point in enumerate(front, 1):
        right = costs.at(point.cost) < WIDTH - 30
        x = costs.at(point.cost) + (7 if right else -7)
        parts.append(
            svg.text(x, values.at(point.value) + 4, str(index), anchor="start" if right else "end", kind="halo")
        )
    names = ", ".join(point.label for point in front)
    return svg.drawing(parts, height=254, label=f"{metric} against {cost}. Not beaten in both: {names}.")


def front_of(points: Sequence[Costed]) -> list[Costed]:
    """Return the points that none beats in both, the cheapest first."""
    return sorted((point for point in points if point.front), key=lambda point: point.cost)


def parallel(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], *, metric: str, mode: str) -> str:
    """Draw parallel coordinates: a line per trial, an axis per factor and last the metric; the best fifth is bold."""
    names = [*axes, metric]
    places = [30 + (WIDTH - 60) * index / (len(names) - 1) for index in range(len(names))]
    scales = {name: _axis([row[name] for row in rows]) for name in names}
    ranked = sorted(rows, key=lambda row: row[metric], reverse=mode == "min")
    parts = []
    for rank, row in enumerate(ranked):
        kind = "ray best" if rank >= len(ranked) * 0.8 else "ray"
        points = [(x, scales[name][0](row[name])) for x, name in zip(places, names, strict=True)]
        parts.append(svg.path(points, kind))
    for index, (x, name) in enumerate(zip(places, names, strict=True)):
        parts.append(svg.line(x, 24, x, 206, "axis"))
        anchor = "start" if index == 0 else "end" if index == len(names) - 1 else "middle"
        shift = -26 if index == 0 else 26 if index == len(names) - 1 else 0
        parts.append(
            svg.text(x + shift, 14 if index % 2 == 0 else 236, name.rsplit(".", 1)[-1], anchor=anchor, kind="title")
        )
        for y, shown in scales[name][1]:
            last = index == len(names) - 1
            parts.append(
                svg.text(x + (-5 if last else 5), y + 4, shown, anchor="end" if last else "start", kind="halo")
            )
    said = f"{len(rows)} trials across {', '.join(axes)} to {metric}; the best fifth are drawn stronger."
    return svg.drawing(parts, height=244, label=said)


def _axis(values: Sequence[Any]) -> tuple[Any, list[tuple[float, str]]]:
    """Return a function from value to height, and the labels of the axis."""
    distinct = ordered(values)
    if len(distinct) <= 6:
        step = 182 / max(1, len(distinct) - 1)
        heights = {
            str(value): 206 - step * index if len(distinct) > 1 else 115.0 for index, value in enumerate(distinct)
        }
        return (lambda value: heights[str(value)]), [(heights[str(value)], _word(value)) for value in distinct]
    wide = min(distinct) > 0 and max(distinct) / min(distinct) >= 10
    scale = Scale.of(distinct, 206, 24, log=wide)
    return scale.at, [(scale.at(value), number(value)) for value in scale.ticks(4)]


def ordered(values: Sequence[Any]) -> list[Any]:
    """Return the distinct values; numbers sorted, others in order of appearance."""
    found = list({str(value): value for value in values}.values())
    numbers = all(isinstance(value, int | float) for value in found)
    return sorted(found) if numbers else found


def _word(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
