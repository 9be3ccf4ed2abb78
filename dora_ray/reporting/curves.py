"""Curves over steps: of one run, or of a sweep's trials overlaid and colored by one factor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

from dora_ray.reporting import svg
from dora_ray.reporting.svg import COLORS, WIDTH, Scale, number

Line = dict[str, Any]
# Maximum number of points of a curve, on a run's page and for one of many overlaid trials.
MAX_POINTS, MAX_OVERLAID_POINTS = 240, 60
LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 10, 10, 186


@dataclass(frozen=True)
class Panel:
    """One chart of a run's page: its measures (name, label), and a caption."""

    title: str
    measures: tuple[tuple[str, str], ...]
    caption: str
    smooth: bool = True


PANELS = (
    Panel(
        "Loss",
        (("loss", "loss"),),
        "Measured against the run's own teacher: shows that training moves, not how good the encoder is.",
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
        "Nats. Diversity near 0: all images get one target (collapse). Distance near 0: targets carry no information.",
    ),
    Panel(
        "Objects",
        (("mask_area", "mask area"), ("object_overlap", "overlap (IoU)")),
        "Share of patches that an object's mask keeps, and overlap of two objects' masks.",
    ),
    Panel(
        "Sinkhorn residual",
        (("sinkhorn_residual", "residual"),),
        "Deviation of the objects from equal shares after the last iteration.",
    ),
    Panel(
        "Center norm",
        (("center_norm", "norm"),),
        "Norm of the teacher's output center. Unbounded growth precedes collapse.",
    ),
    Panel("kNN accuracy", (("knn", "kNN"),), "Top 1 on the labeled folder, with the encoder frozen.", smooth=False),
    Panel(
        "Label propagation",
        (("j_and_f", "J&F"),),
        "The first masks of the labeled tour, propagated through its frames by the encoder's features alone.",
        smooth=False,
    ),
    Panel(
        "Objects against ground truth",
        (("object_iou", "object IoU"), ("tracking_iou", "tracking IoU")),
        "The teacher's own masks against the labeled tour's, in the first frame and over all frames.",
        smooth=False,
    ),
    Panel(
        "Without labels",
        (("view_matching", "view matching"),),
        "Share of held-out clips that are retrieved among the others from another view.",
        smooth=False,
    ),
    Panel("RankMe", (("rankme", "RankMe"),), "Effective number of dimensions of the features.", smooth=False),
    Panel("Throughput", (("clips_per_second", "clips/s"),), "Clips per second of all workers together."),
    Panel(
        "Step time",
        (("step_seconds", "step"), ("exposed_wait_seconds", "waiting for data")),
        "Seconds. Waiting is that of the slowest worker; near 0 the decoders keep up.",
    ),
    Panel(
        "Data wait by stage",
        tuple(
            (f"blocked_{stage.replace(' ', '_')}_seconds", stage)
            for stage in ("production wait", "data transfer", "batching", "format", "collate", "finalize")
        ),
        "Seconds per step of the slowest worker, by stage of Ray Data. Long production wait: add decode CPUs; long "
        "transfer: the network is the bottleneck.",
    ),
    Panel("Workers", (("world_size", "workers"),), "Training workers at each step.", smooth=False),
    Panel("Learning rate", (("lr", "lr"),), "Warm-up, then cosine schedule.", smooth=False),
    Panel("Weight decay", (("weight_decay", "weight decay"),), "Cosine schedule.", smooth=False),
    Panel("Teacher momentum", (("teacher_momentum", "momentum"),), "Cosine schedule.", smooth=False),
)


def thin(steps: Sequence[float], values: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Reduce a curve to at most `most` points by averaging equal groups of neighbors."""
    size = -(-len(values) // most)
    if size <= 1:
        return list(map(float, steps)), list(values)
    starts = range(0, len(values), size)
    return [fmean(steps[i : i + size]) for i in starts], [fmean(values[i : i + size]) for i in starts]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the centered running mean over `window` values; the window shrinks at the ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one measure, at the steps where it was measured."""
    found = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def draw_panel(panel: Panel, lines: Sequence[Line]) -> str | None:
    """Draw a panel as SVG with a legend; return None if none of its measures is present."""
    curves = {label: series(lines, name) for name, label in panel.measures}
    curves = {label: found for label, found in curves.items() if found[1]}
    if not curves:
        return None
    drawn = {label: thin(*found) for label, found in curves.items()}
    steps = Scale.of((step for x, _ in drawn.values() for step in x), LEFT, RIGHT, margin=0)
    values = Scale.of((value for _, y in drawn.values() for value in y), BOTTOM, TOP)
    parts = [svg.y_axis(values, LEFT, RIGHT), svg.x_axis(steps, BOTTOM, TOP, "step")]
    for index, (x, found) in enumerate(drawn.values()):
        y = found
        if panel.smooth and len(y) >= 40:
            parts.append(svg.path(_places(x, y, steps, values), f"curve pale c{index}"))
            y = running_mean(y, max(3, len(y) // 25))
        parts.append(svg.path(_places(x, y, steps, values), f"curve c{index}"))
        if len(x) < 12:
            parts += [svg.dot(*place, f"mark c{index}", radius=3) for place in _places(x, y, steps, values)]
    ends = ", ".join(f"{label} from {number(y[0])} to {number(y[-1])}" for label, (_, y) in drawn.items())
    picture = svg.drawing(parts, height=224, label=f"{panel.title} by step: {ends}.")
    return picture + (legend(list(drawn)) if len(drawn) > 1 else "")


def _places(x: Sequence[float], y: Sequence[float], steps: Scale, values: Scale) -> list[tuple[float, float]]:
    return [(steps.at(a), values.at(b)) for a, b in zip(x, y, strict=True)]


def legend(names: Sequence[str]) -> str:
    """Return a legend as HTML."""
    keys = "".join(
        f'<span class="key"><i class="c{index % COLORS}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    return f'<p class="legend">{keys}</p>'


def overlay(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], groups: Mapping[str, Mapping[str, int]], metric: str
) -> str:
    """Draw one measure of all trials in one chart.

    Args:
        curves: trial -> steps and values.
        groups: factor -> trial -> index of its value; selects the color if the reader chooses that factor.
        metric: name of the measure.
    """
    thinned = {name: thin(*found, MAX_OVERLAID_POINTS) for name, found in curves.items()}
    steps = Scale.of((step for x, _ in thinned.values() for step in x), LEFT, RIGHT, margin=0)
    values = Scale.of((value for _, y in thinned.values() for value in y), BOTTOM, TOP)
    parts = [svg.y_axis(values, LEFT, RIGHT), svg.x_axis(steps, BOTTOM, TOP, "step")]
    for name, (x, y) in thinned.items():
        data = "".join(f' data-f{index}="{places[name]}"' for index, places in enumerate(groups.values()))
        parts.append(svg.path(_places(x, y, steps, values), "curve thin", name, data))
        if len(x) < 3:
            parts += [
                svg.dot(*place, "mark thin", radius=2.5).replace("<circle", f"<circle{data}", 1)
                for place in _places(x, y, steps, values)
            ]
    low, high = min(min(y) for _, y in thinned.values()), max(max(y) for _, y in thinned.values())
    said = f"{metric} by step of {len(thinned)} trials, between {number(low)} and {number(high)}."
    return svg.drawing(parts, height=224, label=said)
