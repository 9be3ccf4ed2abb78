"""Statistics of a sweep: point means, differences and effects, each with a confidence interval.

The model is y = point + seed + noise. Trials with the same seed share initial weights and clip order, so the seed's
effect cancels in differences between points, but not in a point's own mean. Variances are pooled over all points, which
makes two or three seeds per point useful. Pure: no files, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
# Simultaneous confidence level for a winner. The winner is chosen after seeing all points, so its differences to all
# others must hold together.
WINNER_LEVEL = 0.99
ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A value with the half width of its 95 % confidence interval, infinite without repetitions."""

    value: float
    half: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half


@dataclass(frozen=True)
class Observation:
    """One trial: point, seed and metric value."""

    point: Hashable
    seed: int
    value: float


@dataclass(frozen=True)
class Comparison:
    """Ranking of the points of a sweep, best first.

    Attributes:
        points: point -> mean over its seeds.
        behind: point -> difference to the best point, with a 95 % interval; without the best.
        tied: points that are not significantly worse than the best.
        repeated: True if any point has two seeds.
    """

    points: dict[Hashable, Estimate]
    behind: dict[Hashable, Estimate]
    tied: tuple[Hashable, ...]
    repeated: bool

    @property
    def winner(self) -> Hashable | None:
        """Point that is significantly better than all others; None if there is none."""
        return next(iter(self.points)) if self.behind and self.repeated and not self.tied else None


@dataclass(frozen=True)
class Level:
    """One value of a factor and its effect: the deviation from the mean, averaged over all other factors."""

    value: Any
    effect: Estimate


def t_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t (Hill's expansion; exact for 1 and 2 degrees, else off by at most 0.01)."""
    if degrees <= 0:
        return math.inf
    if degrees < 1.5:
        return math.tan(math.pi * (probability - 0.5))
    if degrees < 2.5:
        a = 2 * probability - 1
        return a * math.sqrt(2 / (1 - a * a))
    z, n = NormalDist().inv_cdf(probability), degrees
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
    )
    return z + sum(terms)


def share_half(share: float, total: int) -> float:
    """Return the half width of the 95 % interval of a share of `total` test images (Wilson's score interval)."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    return z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))


class Model:
    """Least-squares fit of y = point + seed + noise.

    Attributes:
        noise: residual variance.
        degrees: degrees of freedom of the residuals.
    """

    def __init__(self, observations: Sequence[Observation]) -> None:
        self.points = list(dict.fromkeys(found.point for found in observations))
        self.seeds = list(dict.fromkeys(found.seed for found in observations))
        self.values = np.array([found.value for found in observations])
        self.of_point = np.array([[found.point == point for point in self.points] for found in observations], float)
        of_seed = np.array([[found.seed == seed for seed in self.seeds] for found in observations], float)
        self.design = np.hstack([self.of_point, of_seed])
        rank = int(np.linalg.matrix_rank(self.design))
        solution = np.linalg.lstsq(self.design, self.values, rcond=None)[0]
        rest = self.values - self.design @ solution
        self.degrees = len(self.values) - rank
        self.noise = float(rest @ rest) / self.degrees if self.degrees else math.inf
        self._spread = np.linalg.pinv(self.design.T @ self.design)
        self._solution = solution
        self.counts = self.of_point.sum(axis=0)
        self.means = self.of_point.T @ self.values / self.counts

    def point_variance(self) -> tuple[float, float]:
        """Return the variance of a trial about its point's mean, seed effect included, and its degrees of freedom."""
        within = self.values - self.of_point @ self.means
        degrees = len(self.values) - len(self.points)
        if degrees == 0:
            return math.inf, 0
        pooled = float(within @ within) / degrees
        count, seeds = len(self.points), len(self.seeds)
        if self.degrees == 0 or seeds < 2 or len(self.values) != count * seeds:
            return pooled, degrees
        # All points share the seeds, so the pooled squares are not independent: use Satterthwaite's approximation.
        of_seeds = max(0.0, float(within @ within) - self.noise * self.degrees) / (seeds - 1)
        parts = (of_seeds / count, (count - 1) * self.noise / count)
        spread = parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / self.degrees
        return sum(parts), sum(parts) ** 2 / spread if spread > 0 else degrees

    def contrast(self, weights: np.ndarray, level: float) -> Estimate:
        """Return a contrast of points (weights that sum to 0) with its confidence interval."""
        vector = np.concatenate([weights, np.zeros(len(self.seeds))])
        error = math.sqrt(max(0.0, self.noise * float(vector @ self._spread @ vector))) if self.degrees else math.inf
        factor = t_quantile(0.5 + level / 2, self.degrees)
        return Estimate(float(vector @ self._solution), factor * error if self.degrees else math.inf)


def compare(observations: Sequence[Observation], *, mode: str) -> Comparison:
    """Rank the points of a sweep, and find those that are not significantly worse than the best.

    Args:
        observations: the trials that have the metric.
        mode: "min" or "max".
    """
    if not observations:
        return Comparison({}, {}, (), repeated=False)
    model = Model(observations)
    variance, degrees = model.point_variance()
    factor = t_quantile(0.5 + LEVEL / 2, degrees)
    means = {
        point: Estimate(float(mean), factor * math.sqrt(variance / count) if degrees else math.inf)
        for point, mean, count in zip(model.points, model.means, model.counts, strict=True)
    }
    ranked = dict(sorted(means.items(), key=lambda item: item[1].value, reverse=mode == "max"))
    best, sign = next(iter(ranked)), 1 if mode == "max" else -1
    behind, tied = {}, []
    pairs = len(ranked) * (len(ranked) - 1) / 2
    for point in list(ranked)[1:]:
        weights = np.array([sign * ((other == best) - float(other == point)) for other in model.points])
        behind[point] = model.contrast(weights, LEVEL)
        # The best point is chosen from the data, so correct for all pairs (Bonferroni).
        sure = model.contrast(weights, 1 - (1 - WINNER_LEVEL) / pairs)
        # If all values are equal, rounding leaves a tiny difference but no noise to compare it with.
        if not sure.low > ROUNDING * max(abs(means[best].value), abs(means[point].value)):
            tied.append(point)
    return Comparison(ranked, behind, tuple(tied), repeated=degrees > 0)


def effects(
    observations: Sequence[Observation], factors: Mapping[str, Callable[[Hashable], Any]]
) -> dict[str, list[Level]]:
    """Estimate the effect of each value of each factor on the metric with an additive model.

    A factor with more than eight numeric values is modeled as a straight line and reported at its two ends. With
    repetitions, the error comes from them alone, so it does not include the model's lack of fit.

    Args:
        observations: the trials.
        factors: name -> function that returns the factor's value at a point.
    """
    columns: list[np.ndarray] = []
    told: dict[str, list[tuple[Any, dict[int, float]]]] = {}
    for name, value_of in factors.items():
        values = [value_of(found.point) for found in observations]
        first = len(columns)
        levels = distinct(values)
        if len(levels) < 2:
            continue
        if _is_line(levels):
            scaled = _scale(values)
            columns.append(scaled - scaled.mean())
            ends = (min(levels), float(columns[-1].min())), (max(levels), float(columns[-1].max()))
            told[name] = [(value, {first: place}) for value, place in ends]
            continue
        shares = [np.array([value == one for value in values], float) for one in levels]
        columns += [share - shares[-1] for share in shares[:-1]]
        last = {first + index: -1.0 for index in range(len(levels) - 1)}
        told[name] = [(value, {first + index: 1.0}) for index, value in enumerate(levels[:-1])] + [(levels[-1], last)]
    return _levels(observations, columns, told) if columns else {}


def _levels(
    observations: Sequence[Observation],
    columns: list[np.ndarray],
    told: Mapping[str, list[tuple[Any, dict[int, float]]]],
) -> dict[str, list[Level]]:
    pure = Model(observations)
    values = pure.values
    seeds = pure.design[:, len(pure.points) :]
    design = np.column_stack([*columns, seeds])
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    spread = np.linalg.pinv(design.T @ design)
    noise, degrees = pure.noise, pure.degrees
    if degrees < 2:
        rest = values - design @ solution
        degrees = len(values) - int(np.linalg.matrix_rank(design))
        noise = float(rest @ rest) / degrees if degrees > 0 else math.inf
    factor = t_quantile(0.5 + LEVEL / 2, degrees)
    result: dict[str, list[Level]] = {}
    for name, levels in told.items():
        for value, weights in levels:
            vector = np.zeros(design.shape[1])
            vector[list(weights)] = list(weights.values())
            error = math.sqrt(max(0.0, noise * float(vector @ spread @ vector))) if degrees > 0 else math.inf
            half = factor * error if degrees > 0 else math.inf
            result.setdefault(name, []).append(Level(value, Estimate(float(vector @ solution), half)))
    return result


def distinct(values: Sequence[Any]) -> list[Any]:
    """Return each value once, numbers by size."""
    found = list({str(value): value for value in values}.values())
    numbers = all(_is_number(value) for value in found)
    return sorted(found) if numbers else found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_line(levels: Sequence[Any]) -> bool:
    return len(levels) > 8 and all(_is_number(value) for value in levels)


def _scale(values: Sequence[Any]) -> np.ndarray:
    """Return the numbers, or their logarithms if they span at least a decade."""
    numbers = np.array(values, float)
    wide = numbers.min() > 0 and numbers.max() / numbers.min() >= 10
    return np.log(numbers) if wide else numbers


def pareto(points: Mapping[Hashable, tuple[float, float]], *, mode: str) -> list[Hashable]:
    """Return the Pareto front of cost and quality, by increasing cost.

    Args:
        points: point -> (cost, quality).
        mode: "max" if higher quality values are better, else "min".
    """
    sign = 1 if mode == "max" else -1
    front: list[Hashable] = []
    best = -math.inf
    for point, (_, quality) in sorted(points.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * quality > best:
            front.append(point)
            best = sign * quality
    return front
