"""Analysis of a sweep's results: the verdict in words, and the values that the page draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from dora_ray.reporting.references import Reference, find_references, shared_reference
from dora_ray.tuning.axes import SEED_KEY, keys_of_axis, value_at
from dora_ray.tuning.results import Row, group_points
from dora_ray.tuning.space import SweepSpec
from dora_ray.tuning.statistics import Comparison, Estimate, Level, Observation, compare, effects, share_half

SHARES = ("knn", "linear", "iou", "view_matching", "corloc", "top1", "j_and_f")


@dataclass(frozen=True)
class Analysis:
    """Analysis of a sweep's results by one metric.

    Attributes:
        spec: the sweep's file.
        rows: all trials.
        comparison: ranking of the points.
        observations: metric values behind comparison and effects.
        effects: factor -> effect of each of its values on the metric.
        references: point -> random encoders and chance to compare with.
        images: number of test images behind each trial's metric.
    """

    spec: SweepSpec
    rows: Sequence[Row]
    comparison: Comparison
    observations: Sequence[Observation]
    effects: Mapping[str, list[Level]]
    references: Mapping[Hashable, Reference]
    images: int | None = None
    factors: tuple[str, ...] = field(default=())

    @cached_property
    def groups(self) -> dict[Hashable, list[Row]]:
        """Finished trials that have the metric, by point."""
        found: dict[Hashable, list[Row]] = {}
        for point, rows in group_points(self.rows, self.spec.metric).items():
            found[point] = rows
        return found

    @cached_property
    def shared(self) -> Reference:
        """Reference that all points share."""
        return shared_reference(self.references.values())

    @property
    def done(self) -> list[Row]:
        """Finished trials that have the metric."""
        return [row for members in self.groups.values() for row in members]

    def show(self, value: float) -> str:
        """Format a value of the metric, as a percentage if it is a share."""
        return f"{100 * value:.1f} %" if is_share(self.spec.metric) else f"{value:.4g}"

    def show_change(self, change: Estimate, *, sign: bool = False) -> str:
        """Format a difference and its interval, in percentage points if the metric is a share."""
        plus, half = "+" if sign else "", self.show_half(change.half)
        if is_share(self.spec.metric):
            return f"{100 * change.value:{plus}.1f} ± {half} points"
        return f"{change.value:{plus}.4g} ± {half}"

    def show_half(self, half: float) -> str:
        """Format a half width."""
        if not math.isfinite(half):
            return "unknown"
        return f"{100 * half:.1f}" if is_share(self.spec.metric) else f"{half:.2g}"

    def outer(self, value: float) -> float:
        """Return a value's half width over test images; 0 if their number is unknown."""
        return share_half(min(1.0, max(0.0, value)), self.images) if self.images else 0.0

    def label(self, point: Hashable) -> str:
        """Return a point's label: the last part of each varied key, and its value."""
        keys = {key for axis in self.factors for key in keys_of_axis(axis)}
        varied = [(key, value) for key, value in _pairs(point) if key in keys or not keys]
        return ", ".join(f"{key.rsplit('.', 1)[-1]} {_word(value)}" for key, value in varied) or "the only point"

    def value_of(self, key: str) -> Callable[[Hashable], Any]:
        """Return a function that reads a factor's value from a point."""
        return _reader(key)


def _pairs(point: Hashable) -> tuple[tuple[str, Any], ...]:
    assert isinstance(point, tuple)
    return point


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_share(metric: str) -> bool:
    """Return whether a metric is a share of 1, shown as a percentage."""
    return any(word in metric for word in SHARES)


def analyze(rows: Sequence[Row], spec: SweepSpec, baseline: Mapping[str, Any] | None = None) -> Analysis:
    """Return what a table says.

    Args:
        rows: of results.csv.
        spec: the sweep's file.
        baseline: content of baseline.json, see `dora_ray.tuning.baseline`.
    """
    groups = group_points(rows, spec.metric)
    found = [
        Observation(point, row.values[SEED_KEY], row.metrics[spec.metric])
        for point, members in groups.items()
        for row in members
    ]
    factors = tuple(key for key in spec.space if len({str(value_at(dict(point), key)) for point in groups}) > 1)
    facts = (baseline or {}).get(spec.metric, {})
    return Analysis(
        spec,
        rows,
        compare(found, mode=spec.mode),
        found,
        effects(found, {key: _reader(key) for key in factors}),
        find_references(groups, spec.metric, facts),
        facts.get("images"),
        factors,
    )


def _reader(key: str) -> Callable[[Hashable], Any]:
    return lambda point: value_at(dict(_pairs(point)), key)


def verdict(found: Analysis) -> str:
    """Answer the sweep's question in a few sentences that claim no more than the seeds and test images support."""
    spec, comparison = found.spec, found.comparison
    if not comparison.points:
        return f"No trial has finished with a {spec.metric} yet."
    (best, estimate), others = next(iter(comparison.points.items())), len(comparison.points) - 1
    name, value = found.label(best), found.show(estimate.value)
    if not comparison.repeated:
        return (
            f"{name} has the best {spec.metric}, {value}, of {others + 1} points with one seed each: this cannot tell "
            "how much of it is chance. Run it again with --resume and more seeds, such as seeds=[0,1,2]."
            + _beside(found)
        )
    first = f"{name}: {spec.metric} {value} ± {found.show_half(estimate.half)} over seeds"
    if outer := found.outer(estimate.value):
        first += f", ± {found.show_half(outer)} over {found.images} test images"
    if not others:
        return f"{first}. It is the only point that finished.{_beside(found)}"
    if comparison.winner is not None:
        runner, behind = next(iter(comparison.behind.items()))
        gap = found.show_change(behind)
        all_others = f"all {others} others; the next" if others > 1 else "the other"
        first += f". It is better than {all_others}, {found.label(runner)}, by {gap}."
        return first + _beside(found)
    tied = len(comparison.tied)
    listed = "; ".join(found.label(point) for point in comparison.tied[:3])
    more = f"; and {tied - 3} more" if tied > 3 else ""
    largest = max(behind.high for behind in comparison.behind.values())
    which = f"{tied} of {others} others" if others > 1 else "the other"
    text = f"{first}; not separable from {which} ({listed}{more})."
    if tied == others:
        most = f"{100 * largest:.1f} points" if is_share(spec.metric) else f"{largest:.4g}"
        text += f" No difference is shown; one of more than {most} would be unlikely to hide here."
    return text + _beside(found)


def _beside(found: Analysis) -> str:
    """Compare the best point with random encoders, with its settings where they matter, and with chance."""
    point, estimate = next(iter(found.comparison.points.items()))
    beside, parts = found.references[point], []
    if beside.random:
        low, high = min(beside.random), max(beside.random)
        word = _beside_random(estimate, low, high, most=found.spec.mode == "max")
        span = found.show(low) if low == high else f"{found.show(low)} to {found.show(high)}"
        same = "" if found.shared.random else " with its settings"
        parts.append(f"it is {word} {len(beside.random)} random encoders{same} ({span})")
    if beside.chance is not None:
        parts.append(f"chance is {found.show(beside.chance)}")
    text = "; ".join(parts)
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _beside_random(estimate: Estimate, low: float, high: float, *, most: bool) -> str:
    """Describe an estimate's interval relative to the range of random encoders; `most`: higher values are better."""
    above, below = estimate.low > high, estimate.high < low
    return (
        "beyond" if (above if most else below) else "worse than" if (below if most else above) else "not clearly beyond"
    )


OTHER_MEASURES = ("j_and_f", "knn", "object_iou", "tracking_iou", "view_matching", "rankme")


def other_verdicts(rows: Sequence[Row], spec: SweepSpec, baseline: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Answer the question by each other measure, since a choice supported by a single measure is weak."""
    found = []
    for metric in OTHER_MEASURES:
        if metric != spec.metric and any(metric in row.metrics for row in rows):
            other = analyze(rows, spec.model_copy(update={"metric": metric, "mode": "max"}), baseline)
            found.append((metric, verdict(other)))
    return found


def caution(spec: SweepSpec) -> str:
    """Return a caution about the metric; empty for metrics measured on held-out data."""
    if is_share(spec.metric) or spec.metric == "rankme":
        return ""
    return (
        f"{spec.metric} is measured against each trial's own teacher, on its own views: "
        "a better value is not a better encoder. To compare encoders, give a labeled folder: evaluation.images=DIR, "
        "metric=knn, mode=max."
    )


def costs(found: Analysis) -> dict[Hashable, float]:
    """Return the mean worker-seconds of each point's trials, if known."""
    known = {
        point: [row.metrics["worker_seconds"] for row in rows if "worker_seconds" in row.metrics]
        for point, rows in found.groups.items()
    }
    return {point: fmean(values) for point, values in known.items() if values}
