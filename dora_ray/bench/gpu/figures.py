"""Figures measured by a part of the check, kept in a file, so that a part killed at its time limit loses none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Maximum length of an error message.
MOST_CHARACTERS = 300


class Figures:
    """Writes figures line by line, and logs each.

    Args:
        path: the file; existing content is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def put(self, name: str, value: Any) -> None:
        """Record a figure, or several as a mapping; a later one of the same name replaces it."""
        line = json.dumps({"name": name, "value": value}, allow_nan=True)
        with self._path.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def attempt(self, name: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Record the result of the work, or its error, so that the next piece of work can run."""
        try:
            value = dict(work())
        except Exception as error:  # noqa: BLE001  # torch and its compiler raise many kinds
            value = {"failed": f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]}
        self.put(name, value)


def read_figures(path: Path) -> dict[str, Any]:
    """Read the figures of a part; a truncated last line is skipped."""
    found: dict[str, Any] = {}
    if not path.exists():
        return found
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["name"]] = entry["value"]
    return found
