"""Interactions of a sweep's factors: whether the effect of one depends on another. Pure: no files, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from dora_ray.tuning.statistics import LEVEL, Estimate, Model, Observation, distinct


def interaction(
    observations: Sequence[Observation], first: Callable[[Hashable], Any], second: Callable[[Hashable], Any]
) -> dict[tuple[Any, Any], float]:
    """Return the mean figure of each pair of values of two factors."""
    cells: dict[tuple[Any, Any], list[float]] = {}
    for found in observations:
        cells.setdefault((first(found.point), second(found.point)), []).append(found.value)
    return {pair: fmean(values) for pair, values in cells.items()}


@dataclass(frozen=True)
class Joint:
    """Difference of a factor's effects on the figure at two values of another factor.

    Attributes:
        change: values of the first factor, from and to.
        more: value of the second factor at which that change raises the figure more.
        less: value of the second factor at which it raises the figure less.
        difference: of the two changes.
        of: how many such differences there are; the interval counts them all.
    """

    change: tuple[Any, Any]
    more: Any
    less: Any
    difference: Estimate
    of: int


def joint_effect(
    observations: Sequence[Observation],
    first: Callable[[Hashable], Any],
    second: Callable[[Hashable], Any],
    rest: Callable[[Hashable], Any],
) -> Joint | None:
    """Find where two factors depart most from effects that add up, with an interval for all departures together.

    Args:
        observations: the trials.
        first: the first factor's value at a point.
        second: the second factor's value at a point.
        rest: the values of all other factors at a point.

    Returns:
        The largest difference of differences; None where the values are not fully crossed or nothing is repeated.
    """
    model = Model(observations)
    cells: dict[tuple[Any, Any], list[int]] = {}
    for index, point in enumerate(model.points):
        cells.setdefault((first(point), second(point)), []).append(index)
    rows, columns = (distinct([pair[place] for pair in cells]) for place in (0, 1))
    kept = {frozenset(str(rest(model.points[index])) for index in members) for members in cells.values()}
    if not model.degrees or len(cells) < len(rows) * len(columns) or len(kept) != 1:
        return None
    shares = {
        pair: np.mean([np.arange(len(model.points)) == index for index in members], axis=0)
        for pair, members in cells.items()
    }
    pairs = [(change, places) for change in combinations(rows, 2) for places in combinations(columns, 2)]
    found = []
    for (low, high), (one, other) in pairs:
        weights = shares[high, one] - shares[low, one] - shares[high, other] + shares[low, other]
        difference = model.contrast(weights, 1 - (1 - LEVEL) / len(pairs))
        more, less = (other, one) if difference.value < 0 else (one, other)
        size = Estimate(abs(difference.value), difference.half)
        found.append(Joint((low, high), more, less, size, len(pairs)))
    return max(found, key=lambda joint: joint.difference.value)
