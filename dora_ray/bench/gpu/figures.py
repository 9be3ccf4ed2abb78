"""Figures that a part of the check has measured so far, in a file: a part that is ended keeps what it had."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# How much a part says of an error.
MOST_CHARACTERS = 300


class Figures:
    """Writes figures line by line, and tells the log of each.

    Args:
        path: the file; what it held is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def put(self, name: str, value: Any) -> None:
        """Keep a figure, or several as a mapping; what is put later under the same name takes its place."""
        line = json.dumps({"name": name, "value": value}, allow_nan=True)
        with self._path.open("a") as file:
            file.write(line + "\n")
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def attempt(self, name: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Keep what the work gives, or what it raised: the next piece of work is done all the same."""
        try:
            value = dict(work())
        except Exception as error:  # noqa: BLE001  # torch and its compiler raise many kinds
            value = {"failed": f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]}
        self.put(name, value)


def read_figures(path: Path) -> dict[str, Any]:
    """Read the figures of a part; a last line that was cut off is left out."""
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
