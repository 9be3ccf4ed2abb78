"""Print results to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from dora_ray import files
from dora_ray.errors import ConfigError


def write(text: str) -> None:
    """Write a text to stdout, with a newline."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def write_facts(facts: Mapping[str, Any]) -> None:
    """Write names and values in aligned columns."""
    width = max((len(name) for name in facts), default=0)
    write("\n".join(f"{name:<{width}}  {_plain(value)}" for name, value in facts.items()))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return str(value)


def write_json(path: str | None, content: Any) -> None:
    """Write the content to the file given by --json, if any."""
    if path is not None:
        try:
            files.write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {path} cannot be written: {error.strerror or error}") from error
