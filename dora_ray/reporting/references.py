"""What a point's figure stands beside: random encoders with its settings, and guessing."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dora_ray.tuning.results import Row


@dataclass(frozen=True)
class Reference:
    """Figures that a point is compared with.

    Attributes:
        random: of encoders that were never trained, one a seed.
        chance: of guessing; None where it is not known.
    """

    random: tuple[float, ...] = ()
    chance: float | None = None


def find_references(
    groups: Mapping[tuple[tuple[str, Any], ...], Sequence[Row]], metric: str, facts: Mapping[str, Any]
) -> dict[Hashable, Reference]:
    """Return what each point stands beside.

    Args:
        groups: the trials of each point.
        metric: its name.
        facts: those of the metric in baseline.json.
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
    """Guessing, where each trial has measured it on its own images: masks of as many random patches."""
    found = [row.metrics[f"{metric}_random_masks"] for row in rows if f"{metric}_random_masks" in row.metrics]
    return fmean(found) if found else None


def shared_reference(references: Iterable[Reference]) -> Reference:
    """Return what all of them have; neither figures nor chance where points differ in them."""
    found = list(references)
    random, chance = {one.random for one in found}, {one.chance for one in found}
    return Reference(random.pop() if len(random) == 1 else (), chance.pop() if len(chance) == 1 else None)
