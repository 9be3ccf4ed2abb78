"""Axes of a sweep's space: allowed forms, and the configuration keys that they set.

An axis is one dotted key, or several that change together, joined by " + ", with a list of values for each point:

    tracking.kind + tracking.num_iterations: {grid: [[dora, 30], [dora, 0], [none, 30]]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_ray.config import Config
from dora_ray.config_section import keys_of, unknown_key
from dora_ray.errors import ConfigError

KINDS = {
    "grid": "grid: [a, b, c]",
    "choice": "choice: [a, b, c]",
    "uniform": "uniform: [low, high]",
    "loguniform": "loguniform: [low, high]",
}
SEED_KEY = "run.seed"
JOINT = " + "


def keys_of_axis(axis: str) -> tuple[str, ...]:
    """Return the configuration keys that an axis sets."""
    return tuple(key.strip() for key in axis.split(JOINT))


def settings(axis: str, value: Any) -> dict[str, Any]:
    """Return key -> value for one value of an axis."""
    keys = keys_of_axis(axis)
    return {axis: value} if len(keys) == 1 else dict(zip(keys, value, strict=True))


def value_at(values: Mapping[str, Any], axis: str) -> Any:
    """Return a trial's value on an axis; for a joint axis its values as one string."""
    keys = keys_of_axis(axis)
    return values.get(axis) if len(keys) == 1 else ", ".join(str(values.get(key)) for key in keys)


def normalize_space(space: Any) -> dict[str, dict[str, list[Any]]]:
    """Return every axis as {kind: values}; a plain list means a grid."""
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(
            "a sweep needs a `space`: dotted keys with values, such as 'tracking.num_objects: {grid: [1, 2, 3]}'"
        )
    return {str(key): _normalize_axis(str(key), axis) for key, axis in space.items()}


def _normalize_axis(key: str, axis: Any) -> dict[str, list[Any]]:
    for one in keys_of_axis(key):
        if one == SEED_KEY:
            raise ConfigError(
                "run.seed is not part of the space: list the seeds under `seeds`, so that the report can average over "
                "them"
            )
        if one not in keys_of(Config):
            raise ConfigError(f"space: {unknown_key(one, Config, 'configuration key')}")
    axis = {"grid": axis} if isinstance(axis, list) else axis
    if not isinstance(axis, Mapping) or len(axis) != 1 or next(iter(axis)) not in KINDS:
        raise ConfigError(f"space: {key}: {axis!r} is not one of {', '.join(f'{{{kind}}}' for kind in KINDS.values())}")
    ((kind, values),) = axis.items()
    if not isinstance(values, list) or not values:
        raise ConfigError(f"space: {key}: {kind} needs a list of values, not {values!r}")
    if kind in ("uniform", "loguniform"):
        _check_interval(key, kind, values)
    if JOINT in key:
        _check_joint(key, kind, values)
    return {kind: list(values)}


def _check_joint(key: str, kind: str, values: list[Any]) -> None:
    count = len(keys_of_axis(key))
    wrong = [value for value in values if not isinstance(value, list) or len(value) != count]
    if kind not in ("grid", "choice") or wrong:
        got = wrong[0] if wrong else f"{kind}: {values}"
        raise ConfigError(f"space: {key} sets {count} keys, so each value is a list of {count}, not {got!r}")


def _check_interval(key: str, kind: str, values: list[Any]) -> None:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if (
        len(values) != 2
        or len(numbers) != 2
        or not numbers[0] < numbers[1]
        or (kind == "loguniform" and numbers[0] <= 0)
    ):
        above = "0 < low < high" if kind == "loguniform" else "low < high"
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if len(numbers) < len(values) else ""
        raise ConfigError(f"space: {key}: {kind} needs [low, high] with {above}, not {values!r}{hint}")
