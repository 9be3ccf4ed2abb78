"""Interactions between pairs of a sweep's factors, in words."""

from __future__ import annotations

from itertools import combinations

from dora_ray.reporting.analysis import Analysis
from dora_ray.reporting.render import figure
from dora_ray.tuning.interactions import joint_effect
from dora_ray.tuning.statistics import ROUNDING

MAX_PAIRS, MAX_VALUES = 6, 8


def factor_pairs(found: Analysis) -> list[tuple[str, str]]:
    """Return the pairs of factors with few enough values to show."""
    points = found.comparison.points
    few = [key for key in found.factors if len({str(found.value_of(key)(point)) for point in points}) <= MAX_VALUES]
    return list(combinations(few, 2))[:MAX_PAIRS]


def describe_interaction(found: Analysis, first: str, second: str) -> str:
    """Describe how the second factor's effect depends on the first, with a 95 % interval; empty if unknown."""
    others = [found.value_of(key) for key in found.factors if key not in (first, second)]
    joint = joint_effect(
        found.observations,
        found.value_of(second),
        found.value_of(first),
        lambda point: [value_of(point) for value_of in others],
    )
    if joint is None:
        return ""
    rows, columns = (key.rsplit(".", 1)[-1] for key in (first, second))
    low, high = (figure(value) for value in joint.change)
    most = f", the largest of {joint.of} such differences" if joint.of > 1 else ""
    rounding = ROUNDING * max(abs(estimate.value) for estimate in found.comparison.points.values())
    verdict = "The two act on each other" if joint.difference.low > rounding else "No interaction is shown"
    size, metric = found.show_change(joint.difference), found.spec.metric
    return (
        f"{verdict}: {columns} {high} over {low} adds {size} more {metric} at {rows} {figure(joint.more)} than at "
        f"{rows} {figure(joint.less)}{most}."
    )
