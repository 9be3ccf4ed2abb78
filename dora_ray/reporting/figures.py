"""The curves of report.html, as plotly figures: what is drawn, how dense, and what a reader should look for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from dora_ray.tuning.results import Line, Row, group_points

INK, GRID = "#1f2933", "#e7ebf0"
COLORS = ("#2457a8", "#c2571a", "#3f8f5b", "#8250a8")
MAX_POINTS = 800


@dataclass(frozen=True)
class Panel:
    """One chart of a run's report: its measures (name, label) and the sentence under its title."""

    title: str
    measures: tuple[tuple[str, str], ...]
    caption: str
    smooth: bool = True
    second_axis: tuple[str, ...] = ()


PANELS = (
    Panel(
        "Loss",
        (("loss", "loss"),),
        "Against the run's own teacher: it shows whether training moves, not how good the encoder is.",
    ),
    Panel(
        "Teacher-student agreement",
        (("object_agreement", "object views"), ("local_agreement", "local views")),
        "Mean cosine between the student's outputs on masked or cropped views and the teacher's on the whole frame.",
    ),
    Panel(
        "Teacher's outputs",
        (
            ("teacher_entropy", "entropy"),
            ("teacher_kl_uniform", "distance to uniform"),
            ("teacher_diversity", "diversity"),
        ),
        "Nats. Diversity near 0: every image gets one target, which is collapse. Distance near 0: targets say nothing.",
    ),
    Panel(
        "Objects",
        (("mask_area", "mask area"), ("object_overlap", "overlap (IoU)")),
        "Share of patches that an object's mask keeps, and how much two objects' masks share.",
    ),
    Panel(
        "Sinkhorn residual",
        (("sinkhorn_residual", "residual"),),
        "How far the objects are from equal shares after the last iteration.",
    ),
    Panel(
        "Center norm",
        (("center_norm", "norm"),),
        "Of the teacher's output center. A norm that grows without end comes before collapse.",
    ),
    Panel("kNN accuracy", (("knn", "kNN"),), "Top 1 on the labeled folder, the encoder frozen.", smooth=False),
    Panel(
        "Objects against the truth",
        (
            ("object_iou", "found in the first frame"),
            ("tracking_iou", "followed through the others"),
            ("object_iou_random_masks", "chance: random patches"),
            ("object_iou_moved_masks", "chance: moved masks"),
        ),
        "Mean IoU of the run's own masks with the labeled tour's objects.",
        smooth=False,
    ),
    Panel(
        "Scenes known again",
        (
            ("view_matching", "mean"),
            ("view_matching_later", "in a later frame"),
            ("view_matching_local", "in a small crop"),
        ),
        "Share of a video's scenes that the encoder finds among all of them.",
        smooth=False,
    ),
    Panel("RankMe", (("rankme", "RankMe"),), "Directions that the features of a video's scenes use.", smooth=False),
    Panel("Throughput", (("clips_per_second", "clips/s"),), "Clips that all workers trained on in a second."),
    Panel(
        "Where a step's time goes",
        (("step_seconds", "step"), ("data_wait_seconds", "waiting for data")),
        "Seconds. Waiting near 0: the decoders keep up.",
    ),
    Panel("Workers", (("world_size", "workers"),), "Train workers at each step.", smooth=False),
    Panel("Learning rate", (("lr", "lr"),), "Warm-up, then half a cosine.", smooth=False),
    Panel(
        "Weight decay and teacher momentum",
        (("weight_decay", "weight decay"), ("teacher_momentum", "teacher momentum")),
        "Half cosines of the step.",
        smooth=False,
        second_axis=("teacher_momentum",),
    ),
)


def thin(steps: Sequence[int], values: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means over equal runs of neighbors, so that no peak is picked at random."""
    size = -(-len(values) // most)
    if size <= 1:
        return list(map(float, steps)), list(values)
    starts = range(0, len(values), size)
    return [fmean(steps[i : i + size]) for i in starts], [fmean(values[i : i + size]) for i in starts]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centered mean over `window` values, narrower at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one measure, where it was measured."""
    found = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def draw_panel(panel: Panel, lines: Sequence[Line]) -> str | None:
    """The panel as an HTML fragment; None when nothing of it was measured."""
    figure = _figure()
    drawn = 0
    for index, (name, label) in enumerate(panel.measures):
        steps, values = series(lines, name)
        if not values:
            continue
        drawn += 1
        second = "y2" if name in panel.second_axis else "y"
        _add_curve(figure, steps, values, label=label, color=COLORS[index], smooth=panel.smooth, axis=second)
    if not drawn:
        return None
    figure.update_layout(showlegend=drawn > 1)
    if panel.second_axis:
        figure.update_layout(
            yaxis2={
                "overlaying": "y",
                "side": "right",
                "showgrid": False,
                "zeroline": False,
                "tickformat": ".3f",
                "tickmode": "auto",
                "nticks": 5,
            }
        )
    figure.update_xaxes(title="step")
    return to_fragment(figure)


def _add_curve(
    figure: Any, steps: list[int], values: list[float], *, label: str, color: str, smooth: bool, axis: str
) -> None:
    x, y = thin(steps, values)
    mode = "lines+markers" if len(x) < 12 else "lines"
    if smooth and len(y) >= 40:
        pale = {"color": color, "width": 1}
        figure.add_trace(
            go.Scatter(x=x, y=y, mode="lines", line=pale, opacity=0.25, showlegend=False, hoverinfo="skip", yaxis=axis)
        )
        y = running_mean(y, max(3, len(y) // 25))
    figure.add_trace(go.Scatter(x=x, y=y, mode=mode, name=label, line={"color": color, "width": 2}, yaxis=axis))


def draw_key(key: str, rows: Sequence[Row], metric: str, best: Sequence[Row]) -> str:
    """A sweep's metric against one varied key: a dot a trial, the mean of each value, the best point marked."""
    members = [row for group in group_points(rows, metric).values() for row in group]
    numbers = all(isinstance(row.values[key], int | float) and not isinstance(row.values[key], bool) for row in members)
    place = (lambda value: value) if numbers else str
    figure = _figure()
    means: dict[Any, list[float]] = {}
    for row in members:
        means.setdefault(place(row.values[key]), []).append(row.metrics[metric])
    order = sorted(means) if numbers else list(means)
    dots = {"color": COLORS[0], "size": 8, "opacity": 0.45}
    x = [place(row.values[key]) for row in members]
    y = [row.metrics[metric] for row in members]
    figure.add_trace(
        go.Scatter(x=x, y=y, mode="markers", marker=dots, name="a trial", text=[row.name for row in members])
    )
    line = {"color": COLORS[0], "width": 2}
    figure.add_trace(
        go.Scatter(x=order, y=[fmean(means[value]) for value in order], mode="lines+markers", line=line, name="mean")
    )
    ring = {"color": "rgba(0,0,0,0)", "size": 15, "line": {"color": COLORS[1], "width": 2}}
    x = [place(row.values[key]) for row in best]
    figure.add_trace(
        go.Scatter(x=x, y=[row.metrics[metric] for row in best], mode="markers", marker=ring, name="best point")
    )
    positive = numbers and all(value > 0 for value in order)
    if positive and len(order) > 2 and max(order) / min(order) >= 20:
        figure.update_xaxes(type="log")
    if numbers and len(order) <= 8:
        figure.update_xaxes(tickvals=order, ticktext=[f"{value:g}" for value in order])
    figure.update_xaxes(title=key)
    figure.update_yaxes(title=metric)
    return to_fragment(figure, height=320)


def _figure() -> Any:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12, "color": INK},
        margin={"l": 56, "r": 44, "t": 12, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GRID, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor=GRID, automargin=True, nticks=6)
    return figure


def to_fragment(figure: Any, *, height: int = 250) -> str:
    """The figure as a <div>; the page carries plotly.js once."""
    config = {"displayModeBar": False, "responsive": True}
    return str(
        pio.to_html(figure, include_plotlyjs=False, full_html=False, default_height=f"{height}px", config=config)
    )
