"""Chart of a sweep's points: intervals, best first, with random encoders and chance."""

from __future__ import annotations

from statistics import fmean

from dora_ray.reporting import charts
from dora_ray.reporting.analysis import Analysis, is_share
from dora_ray.reporting.charts import Bar

# Only this many of the best points are drawn.
MAX_POINTS = 40


def percent(found: Analysis) -> float:
    """Return the factor for drawing the metric: 100 for shares, else 1."""
    return 100.0 if is_share(found.spec.metric) else 1.0


def draw_points(found: Analysis, *, title: str) -> str:
    """Draw the points; the best one and those not significantly worse are blue."""
    scale, comparison = percent(found), found.comparison
    tied = {*comparison.tied, *list(comparison.points)[:1]}
    shared = found.shared
    bars = []
    for point, estimate in list(comparison.points.items())[:MAX_POINTS]:
        beside = found.references[point]
        bars.append(
            Bar(
                found.label(point),
                scale * estimate.value,
                scale * estimate.half,
                scale * found.outer(estimate.value),
                "c0" if point in tied else "c7",
                random=scale * fmean(beside.random) if beside.random and not shared.random else None,
                chance=scale * beside.chance if beside.chance is not None and shared.chance is None else None,
            )
        )
    references = [("chance", scale * shared.chance)] if shared.chance is not None else []
    references += [("random encoder", scale * fmean(shared.random))] if shared.random else []
    best = f"the best: {bars[0].label}, {bars[0].value:.4g}"
    said = f"{found.spec.metric} of {len(bars)} points with 95 % intervals; {best}."
    return charts.intervals(bars, title=title, label=said, references=references)


def describe_references(found: Analysis) -> str:
    """Explain the colors and the reference marks."""
    parts, every = [], [beside for beside in found.references.values() if beside.random]
    if len(found.comparison.points) > 1 and found.comparison.repeated:
        parts.append("Blue: the best and what cannot be told from it.")
    if found.shared.random:
        shown = ", ".join(found.show(value) for value in found.shared.random)
        parts.append(f"Random encoders of the same architecture, {len(found.shared.random)} seeds: {shown}.")
    elif every:
        parts.append(f"Rings: the mean of {len(every[0].random)} random encoders with each point's own settings.")
    return " ".join(parts)
