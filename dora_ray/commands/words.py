"""The words of a command: a recipe or files, and overrides of the form key=value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dora_ray.errors import ConfigError

if TYPE_CHECKING:
    from dora_ray.config import Config

OVERRIDE = re.compile(r"[A-Za-z_]+(\.[A-Za-z_]+)*=")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names, and overrides of the form key=value."""
    overrides = [word for word in words if OVERRIDE.match(word)]
    return [word for word in words if word not in overrides], overrides


def load(words: Sequence[str]) -> Config | None:
    """The configuration that a command's words name; None when they name none."""
    from dora_ray.config import load_config

    names, overrides = split(words)
    if len(names) > 1:
        raise ConfigError(
            f"{len(names)} recipes or files were given ({', '.join(names)}): "
            "give one, and changes to it as section.key=value"
        )
    if not names and overrides:
        raise ConfigError(
            f"{overrides[0]} changes a configuration, but none was named: "
            "begin with a recipe (paper, released, tiny) or a YAML file"
        )
    return load_config(names[0], *overrides) if names else None
