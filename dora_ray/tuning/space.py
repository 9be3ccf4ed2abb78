"""A sweep's file, and the trials that follow from it: pure, the same at every call, nothing started.

Trials are the product of all grids, times `num_samples` draws of what is drawn, times the seeds. Every grid point sees
the same draws, so that grid values are compared like with like.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dora_ray.config import Config, load_config
from dora_ray.config_section import Count, Natural, Section, checked, keys_of, unknown_key
from dora_ray.config_source import flatten, parse_override, parse_yaml
from dora_ray.errors import ConfigError

KINDS = {
    "grid": "grid: [a, b, c]",
    "choice": "choice: [a, b, c]",
    "uniform": "uniform: [low, high]",
    "loguniform": "loguniform: [low, high]",
}
SEED_KEY = "run.seed"


class SweepSpec(Section):
    """What a sweep's file says."""

    question: str = ""
    """The question that the sweep answers, as one sentence; the report repeats it."""
    base: str = "tiny"
    """Recipe or YAML file that every trial starts from."""
    overrides: tuple[str, ...] = ()
    """What all trials change in it: "section.key=value", or nested mappings."""
    space: dict[str, dict[str, list[Any]]]
    """Dotted key -> {grid: [...]}, {choice: [...]}, {uniform: [low, high]} or {loguniform: [low, high]}."""
    metric: str = "loss"
    """Measure of metrics.jsonl that ranks the trials, such as loss or knn."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""
    num_samples: Count = 1
    """Draws for everything in the space that is not a grid."""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    """Values of run.seed for each point: two or more show how much is chance."""
    max_concurrent_trials: Count | None = None
    """Trials at a time; not set: as many as the cluster holds workers for."""
    photographs: bool = False
    """Where evaluation.images is not set: kNN on crops of ten photographs that packages of the extra `demo` ship."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops the worse trials early; it needs a metric that is reported at every step."""


class Trial(Section):
    """One run of a sweep.

    Attributes:
        name: its folder under trials/.
        values: what distinguishes it: dotted key -> value, run.seed included.
        config: its whole configuration.
    """

    name: str
    values: dict[str, Any]
    config: Config


def load_sweep(source: str | Path | Mapping[str, Any], *overrides: str) -> SweepSpec:
    """A checked sweep file.

    Args:
        source: the file, or its content as a mapping.
        overrides: "section.key=value" for the configuration of all trials; "metric=knn" and the like for the sweep.

    Raises:
        ConfigError: naming the key, what it got, and what is allowed.
    """
    values = dict(source) if isinstance(source, Mapping) else parse_yaml(_read(Path(source)), str(source))
    own = [text for text in overrides if _key_of(text) in SweepSpec.model_fields]
    values |= {_key_of(text): _value_of(text) for text in own}
    values["overrides"] = [
        *_as_overrides(values.get("overrides") or []),
        *(text for text in overrides if text not in own),
    ]
    return _validate({**values, "space": _normalize_space(values.get("space"))})


def expand(spec: SweepSpec) -> list[Trial]:
    """All trials, each with its checked configuration.

    Raises:
        ConfigError: a value that the configuration refuses, or workers that may change their number.
    """
    points = list(_points(spec))
    width = max(2, len(str(len(points) - 1)))
    return [_trial(spec, f"{index:0{width}d}", point) for index, point in enumerate(points)]


def _points(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """The values of every trial: draws, then grids, then seeds."""
    grids = {key: axis["grid"] for key, axis in spec.space.items() if "grid" in axis}
    for sample in range(spec.num_samples):
        drawn = {key: _draw(key, axis, sample) for key, axis in spec.space.items() if "grid" not in axis}
        for combination in product(*grids.values()):
            for seed in spec.seeds:
                chosen = drawn | dict(zip(grids, combination, strict=True))
                yield {**{key: chosen[key] for key in spec.space}, SEED_KEY: seed}


def _draw(key: str, axis: Mapping[str, list[Any]], sample: int) -> Any:
    """The value number `sample` of a drawn key: a function of both, so that a resumed sweep draws the same."""
    rng = np.random.default_rng((zlib.crc32(key.encode()), sample))
    ((kind, values),) = axis.items()
    if kind == "choice":
        return values[int(rng.integers(len(values)))]
    low, high = values
    if kind == "uniform":
        return float(f"{rng.uniform(low, high):.4g}")
    return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.4g}")


def _trial(spec: SweepSpec, number: str, point: dict[str, Any]) -> Trial:
    texts = [f"{key}={json.dumps(value)}" for key, value in point.items()]
    try:
        config = load_config(spec.base, *spec.overrides, *texts)
    except ConfigError as error:
        raise ConfigError(f"the sweep's point {', '.join(texts)} cannot be run: {error}") from error
    if not isinstance(config.cluster.num_workers, int):
        raise ConfigError(
            f"cluster.num_workers={list(config.cluster.num_workers)} lets a trial change its size, "
            "and trials would take each other's workers. Give all a fixed number, such as cluster.num_workers=1."
        )
    words = [f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in point.items()]
    return Trial(
        name="_".join([number, *(re.sub(r"[^A-Za-z0-9.-]+", "-", word) for word in words)]), values=point, config=config
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no sweep file {path}. Give a YAML file such as sweeps/objects.yaml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def _value_of(override: str) -> Any:
    return parse_override(override)[1]


def _as_overrides(values: Any) -> list[str]:
    if isinstance(values, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in flatten(values).items()]
    if isinstance(values, list):
        return [str(value) for value in values]
    raise ConfigError(f"overrides={values!r}: give a list of section.key=value, or a mapping of sections")


def _normalize_space(space: Any) -> dict[str, dict[str, list[Any]]]:
    """Every axis as {kind: values}; a plain list is a grid."""
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(
            "a sweep needs a `space`: dotted keys with values, such as 'tracking.num_objects: {grid: [1, 2, 3]}'"
        )
    return {str(key): _normalize_axis(str(key), axis) for key, axis in space.items()}


def _normalize_axis(key: str, axis: Any) -> dict[str, list[Any]]:
    if key == SEED_KEY:
        raise ConfigError(
            "run.seed is not part of the space: list the seeds under `seeds`, so that the report can average over them"
        )
    if key not in keys_of(Config):
        raise ConfigError(f"space: {unknown_key(key, Config, 'configuration key')}")
    axis = {"grid": axis} if isinstance(axis, list) else axis
    if not isinstance(axis, Mapping) or len(axis) != 1 or next(iter(axis)) not in KINDS:
        raise ConfigError(f"space: {key}: {axis!r} is not one of {', '.join(f'{{{kind}}}' for kind in KINDS.values())}")
    ((kind, values),) = axis.items()
    if not isinstance(values, list) or not values:
        raise ConfigError(f"space: {key}: {kind} needs a list of values, not {values!r}")
    if kind in ("uniform", "loguniform"):
        _check_interval(key, kind, values)
    return {kind: list(values)}


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


def _validate(values: Mapping[str, Any]) -> SweepSpec:
    spec = checked(SweepSpec, values, "key of a sweep's file:")
    if spec.num_samples > 1 and all("grid" in axis for axis in spec.space.values()):
        raise ConfigError(
            f"num_samples={spec.num_samples} would repeat the same points, since all of the space is grids. "
            "To see how much is chance, list more `seeds`."
        )
    return spec
