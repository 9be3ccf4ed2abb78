"""Read configuration sources into one mapping: recipes, YAML files, `base` and key=value overrides, not validated."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import reduce
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml

from dora_ray.errors import ConfigError

# Key whose value may be an existing path, taken literally: film names may contain YAML syntax.
VIDEOS = "data.videos"
QUOTED_VIDEOS = (
    "quote the whole word for the shell, and special names for YAML: 'data.videos=[\"Venice, Italy [id].mp4\", b.mp4]'"
)


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _recipes().iterdir() if entry.name.endswith(".yaml"))


def _recipes() -> Any:
    return package_files("dora_ray") / "recipes"


def load_values(source: str | Path | Mapping[str, Any], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the values of a recipe, a YAML file or a mapping, merged over those of its `base`."""
    values = dict(source) if isinstance(source, Mapping) else parse_yaml(_read_source(str(source)), str(source))
    base = values.pop("base", None)
    if base is None:
        return values
    if str(base) in seen:
        raise ConfigError(f"base: {base} is circular ({' -> '.join([*seen, str(base)])})")
    return _merge(load_values(str(base), (*seen, str(base))), values)


def _read_source(source: str) -> str:
    if source in recipe_names():
        return str((_recipes() / f"{source}.yaml").read_text(encoding="utf-8"))
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source} cannot be read as text: {error}") from error
    near = difflib.get_close_matches(source, recipe_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{source!r} is neither a recipe ({', '.join(recipe_names())}) nor an existing YAML file.{hint}")


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def with_override(values: Mapping[str, Any], override: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with an override: "section.key=value", or a mapping of sections or of dotted keys."""
    if isinstance(override, str):
        override = dict([parse_override(override)])
    elif not isinstance(override, Mapping):
        raise ConfigError(
            f"{override!r} is not an override: write 'optim.steps=300' or a mapping such as "
            "{'optim': {'steps': 300}}"
        )
    for key, value in override.items():
        values = _merge(values, reduce(lambda inner, part: {part: inner}, reversed(str(key).split(".")), value))
    return dict(values)


def parse_override(override: str) -> tuple[str, Any]:
    """Parse "section.key=value" into ("section.key", value); raise ConfigError for other forms or invalid YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} has no value: write key=value, such as optim.lr=1e-3")
    if key == VIDEOS and (path := _existing_path(text)) is not None:
        return key, path
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        hint = f"; {QUOTED_VIDEOS}" if key == VIDEOS else ""
        raise ConfigError(f"the value of {key} is not valid YAML: {text!r}{hint}") from error


def _existing_path(text: str) -> str | None:
    """Return the text, with or without the brackets of a list, if it is an existing path; else None."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return next((path for path in (text, inner) if path and os.path.exists(os.path.expanduser(path))), None)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse a YAML mapping; raise ConfigError with line and column if it is malformed."""
    try:
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{name} is not valid YAML: {where}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name} holds a {type(values).__name__}, not a mapping of sections such as 'optim: {{lr: 1e-3}}'"
        )
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat
