"""Sweep files and the trials that they define; pure and deterministic.

Trials are the product of all grids, times `num_samples` draws of the random axes, times the seeds. Every grid point
gets the same draws, so that grid values are comparable. A trial's name follows from its values, so that a sweep can
grow and keep its trials.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dora_ray.config import Config, load_config
from dora_ray.config_section import Count, Natural, Positive, Section, checked
from dora_ray.config_source import flatten, parse_override, parse_yaml
from dora_ray.errors import ConfigError
from dora_ray.tuning.axes import SEED_KEY, keys_of_axis, normalize_space, settings

# The key under which Ray Tune's Repeater numbers the trials of one point.
REPETITION = "__trial_index__"
NAME_LENGTH = 100


class TourSpec(Section):
    """Labeled tours of a sweep: a film to train on, and a held-out film with another seed to evaluate on.

    They are rendered once, as by `dora-ray data synth tour`; see there.
    """

    seconds: Positive = 60.0
    """Length of the training film; the held-out film is a quarter as long, at least 80 seconds."""
    width: Count = 320
    """Pixels."""
    height: Count = 180
    """Pixels."""
    frames_per_second: Count = 12
    """Frames a second."""
    num_objects: Count = 4
    """Objects that move at the same time."""
    seed: Natural = 0
    """Seed of the training film; the held-out film uses the next one."""


class SweepSpec(Section):
    """Contents of a sweep file."""

    question: str = ""
    """Question that the sweep answers, in one sentence; shown in the report."""
    base: str = "tiny"
    """Recipe or YAML file that every trial starts from."""
    overrides: tuple[str, ...] = ()
    """Changes to the base for all trials: "section.key=value", or nested mappings."""
    space: dict[str, dict[str, list[Any]]]
    """Dotted key, or several joined by " + " -> {grid: [...]}, {choice: [...]}, {uniform: [low, high]} or {loguniform:
    [low, high]}."""
    metric: str = "loss"
    """Metric in metrics.jsonl that ranks the trials, such as loss or knn."""
    mode: Literal["min", "max"] = "min"
    """Better direction of the metric: less or more."""
    num_samples: Count = 1
    """Number of draws for all axes that are not a grid."""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    """Values of run.seed for each point; two or more show how much is chance."""
    max_concurrent_trials: Count | None = None
    """Maximum number of concurrent trials; default: as many as fit on the cluster."""
    photographs: bool = False
    """Evaluate kNN on crops of ten photographs from packages of the extra `demo`, unless evaluation.images is set."""
    tour: TourSpec | None = None
    """Train on a labeled tour rendered for the sweep, and evaluate objects and views on a held-out one, unless
    data.videos, evaluation.tour and evaluation.video name others (extra: demo)."""
    scheduler: Literal["none", "asha"] = "none"
    """asha stops the worse trials early; it needs a metric that is reported in every line."""
    search: Literal["all", "tpe"] = "all"
    """all: every point of the space. tpe: Optuna proposes `num_samples` points, using the results so far; a grid then
    acts as a choice (extra: optuna)."""

    @property
    def count(self) -> int:
        """Number of trials of the sweep."""
        if self.search == "tpe":
            return self.num_samples * len(self.seeds)
        grids = [len(axis["grid"]) for axis in self.space.values() if "grid" in axis]
        return prod(grids) * self.num_samples * len(self.seeds)


class Trial(Section):
    """One run of a sweep.

    Attributes:
        name: its folder under trials/, made of its values and its id.
        values: varied key (dotted) -> value, run.seed included.
        config: its complete configuration.
    """

    name: str
    values: dict[str, Any]
    config: Config

    @property
    def short_id(self) -> str:
        """Six hexadecimal digits, a hash of the values."""
        return self.name.rsplit("_", 1)[-1]


def load_sweep(source: str | Path | Mapping[str, Any], *overrides: str) -> SweepSpec:
    """Load and check a sweep file.

    Args:
        source: the file, or its content as a mapping.
        overrides: "section.key=value" for the configuration of all trials; "metric=knn" and the like for the sweep.

    Raises:
        ConfigError: a value is invalid; the message names the key, the value and what is allowed.
    """
    values = dict(source) if isinstance(source, Mapping) else parse_yaml(_read(Path(source)), str(source))
    own = [text for text in overrides if _key_of(text) in SweepSpec.model_fields]
    values |= {_key_of(text): _value_of(text) for text in own}
    if values.get("tour") is True:
        values["tour"] = {}
    values["overrides"] = [
        *_as_overrides(values.get("overrides") or []),
        *(text for text in overrides if text not in own),
    ]
    return _validate({**values, "space": normalize_space(values.get("space"))})


def base_config(spec: SweepSpec) -> Config:
    """Return the configuration that every trial starts from.

    Raises:
        ConfigError: the configuration is invalid, or sets a key that the sweep varies.
    """
    axes = {key: axis for axis in spec.space for key in keys_of_axis(axis)}
    swept = [text for text in spec.overrides if _key_of(text) in {*axes, SEED_KEY}]
    if swept:
        name = axes.get(_key_of(swept[0]), "")
        axis = f"space: {name}: {spec.space[name]}" if name else "seeds"
        raise ConfigError(
            f"{swept[0]} sets a key that this sweep varies ({axis}), so it would have no effect. "
            "Leave it out, or change the space in the sweep file; set seeds with seeds=[0,1]."
        )
    return load_config(spec.base, *spec.overrides)


def expand(spec: SweepSpec) -> list[Trial]:
    """Return all trials with checked configurations; with search=tpe one for each value of the space, as a check.

    Raises:
        ConfigError: the configuration refuses a value, or the number of workers is a range.
    """
    base = base_config(spec)
    points = _samples(spec) if spec.search == "tpe" else _points(spec)
    return [make_trial(base, point) for point in points]


def _samples(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """Yield points that cover each value, or end of an interval, of every axis once."""
    first = {key: values[0] for key, axis in spec.space.items() for values in axis.values()}
    for key, axis in spec.space.items():
        for value in next(iter(axis.values())):  # joint axes are refused with search=tpe
            yield {**first, key: value, SEED_KEY: spec.seeds[0]}


def with_seed(point: Mapping[str, Any], spec: SweepSpec) -> dict[str, Any]:
    """Return the values of a trial proposed by Ray Tune; Optuna's numbered repetitions become seeds."""
    values = dict(point)
    repetition = values.pop(REPETITION, None)
    return values if repetition is None else {**values, SEED_KEY: spec.seeds[repetition]}


def _points(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """Yield the values of every trial: by draw, then grid point, then seed."""
    grids = {key: axis["grid"] for key, axis in spec.space.items() if "grid" in axis}
    for sample in range(spec.num_samples):
        drawn = {key: _draw(key, axis, sample) for key, axis in spec.space.items() if "grid" not in axis}
        for combination in product(*grids.values()):
            for seed in spec.seeds:
                chosen = drawn | dict(zip(grids, combination, strict=True))
                found = (settings(axis, chosen[axis]) for axis in spec.space)
                yield {**{key: value for some in found for key, value in some.items()}, SEED_KEY: seed}


def _draw(key: str, axis: Mapping[str, list[Any]], sample: int) -> Any:
    """Return draw number `sample` of an axis: a function of both, so that a resumed sweep draws the same value."""
    rng = np.random.default_rng((zlib.crc32(key.encode()), sample))
    ((kind, values),) = axis.items()
    if kind == "choice":
        return values[int(rng.integers(len(values)))]
    low, high = values
    if kind == "uniform":
        return float(f"{rng.uniform(low, high):.4g}")
    return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.4g}")


def make_trial(base: Config, values: Mapping[str, Any]) -> Trial:
    """Return the trial with these values.

    Raises:
        ConfigError: the configuration refuses a value, or the number of workers is a range.
    """
    texts = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    try:
        config = load_config(base, *texts)
    except ConfigError as error:
        raise ConfigError(f"the sweep's point {', '.join(texts)} cannot be run: {error}") from error
    if not isinstance(config.cluster.num_workers, int):
        raise ConfigError(
            f"cluster.num_workers={list(config.cluster.num_workers)} is a range: trials would take each other's "
            "workers. Set a fixed number, such as cluster.num_workers=1."
        )
    return Trial(name=name_of(values), values=dict(values), config=config)


def name_of(values: Mapping[str, Any]) -> str:
    """Return a trial's name: its values, truncated if too long, and a unique id."""
    words = [f"{key.rsplit('.', 1)[-1].replace('_', '-')}-{_word(value)}" for key, value in values.items()]
    digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:6]
    text = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", word) for word in words)
    return f"{text[:NAME_LENGTH]}_{digest}"


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def _validate(values: Mapping[str, Any]) -> SweepSpec:
    spec = checked(SweepSpec, values, "key of a sweep file:")
    lists = [key for key, axis in spec.space.items() if any(isinstance(v, list) for v in next(iter(axis.values())))]
    if spec.search == "tpe" and lists:
        raise ConfigError(f"space: {lists[0]}: search=tpe does not support values that are lists: use search=all")
    if spec.search == "tpe" and spec.scheduler != "none":
        raise ConfigError(f"search=tpe needs complete trials, but scheduler={spec.scheduler} would stop some early")
    if spec.search == "all" and spec.num_samples > 1 and all("grid" in axis for axis in spec.space.values()):
        raise ConfigError(
            f"num_samples={spec.num_samples} would repeat the same points, because every axis is a grid. "
            "To see how much is chance, list more `seeds`."
        )
    return spec
