"""Absolute paths in a configuration, valid in any process and working directory."""

from __future__ import annotations

from typing import Any

from dora_ray import files
from dora_ray.checkpoints import TIMM
from dora_ray.config import Config, load_config
from dora_ray.video.sources import PACKAGE

PATH_KEYS = (
    *("data.videos", "data.store", "data.cache", "model.init"),
    *("evaluation.images", "evaluation.tour", "evaluation.video"),
)


def absolute_paths(value: Any) -> Any:
    """Make a path, or each path of a list, absolute; URIs and names of packages and models stay unchanged."""
    if isinstance(value, list | tuple):
        return [absolute_paths(path) for path in value]
    if not isinstance(value, str) or value.startswith((PACKAGE, TIMM)):
        return value
    return files.absolute(value)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with the paths of `PATH_KEYS` made absolute."""
    values = config.model_dump(mode="json")
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        values[section][name] = absolute_paths(values[section][name])
    return load_config(values)
