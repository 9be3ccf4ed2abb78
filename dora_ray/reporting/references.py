"""References for a point's metric: random encoders with its settings, and chance."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dora_ray.tuning.results import Row


@dataclass(frozen=True)
class Reference:
    """Values to compare a point with.

    Attributes:
        random: values of untrained encoders, one per seed.
        chance: value of guessing; None if unknown.
    """

    random: tuple[float, ...] = ()
    chance: float | None = None


def find_references(
    groups: Mapping[tuple[tuple[str, Any], ...], Sequence[Row]], metric: str, facts: Mapping[str, Any]
) -> dict[Hashable, Reference]:
    """Return the reference of each point.

    Args:
        groups: the trials of each point.
        metric: name of the metric.
        facts: the metric's entry in baseline.json.
    """
    of_point = {_key(known["values"]): known["random"] for known in facts.get("points", ())}
    return {
        point: Reference(
            tuple(facts.get("random") or of_point.get(_key(dict(point)), ())),
            facts["chance"] if "chance" in facts else _measured_chance(members, metric),
        )
        for point, members in groups.items()
    }


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _measured_chance(rows: Sequence[Row], metric: str) -> float | None:
    """Return the chance level measured by the trials themselves, with masks of random patches; None without one."""
    found = [row.metrics[f"{metric}_random_masks"] for row in rows if f"{metric}_random_masks" in row.metrics]
    return fmean(found) if found else None


def shared_reference(references: Iterable[Reference]) -> Reference:
    """Return the reference that all points share; a part in which they differ stays empty."""
    found = list(references)
    random, chance = {one.random for one in found}, {one.chance for one in found}
    return Reference(random.pop() if len(random) == 1 else (), chance.pop() if len(chance) == 1 else None)
