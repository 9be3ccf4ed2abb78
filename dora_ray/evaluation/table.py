"""Format evaluations as a table of encoders, random encoders and chance. Does not import torch."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dora_ray.evaluation.tasks import TASKS, Task

LINE = 110  # characters of a line of text
Results = Mapping[str, Any]
Lines = list[list[str]]


def show_evaluations(named: Mapping[str, dict[str, Any]], random: Mapping[str, dict[str, Any]]) -> str:
    """Return a heading, the protocol, a table, and notes.

    Args:
        named: Evaluations of one task on one folder, by encoder name.
        random: The same for random encoders.
    """
    first = next(iter(named.values()))
    task, results = TASKS[first["task"]], first["results"]
    columns = _columns(task, results)
    lines = [["encoder", *columns]]
    for name, evaluation in {**named, **random}.items():
        lines.append([name, *(_score(evaluation["results"], where) for where in columns.values())])
    for name, places in task.chance.items():
        cells = [_chance(results, places, column, columns[column]) for column in columns]
        if any(cells):
            lines.append([name, *cells])
    parts = [
        f"{task.title}, {task.data} {first['data']}\n{_protocol(task, first)}",
        aligned(lines),
        _parts_of(task, results) if len(named) == 1 else "",
        "\n".join(_notes(named)),
    ]
    return "\n\n".join(part for part in parts if part)


def _columns(task: Task, results: Results) -> dict[str, tuple[str, ...]]:
    """Return the path of each column's values in the results; a mapping makes one column per entry."""
    found: dict[str, tuple[str, ...]] = {}
    for header, key in task.columns.items():
        if isinstance(results[key], Mapping):
            found |= {f"{header}{entry}": (key, entry) for entry in results[key]}
        else:
            found[header] = (key,)
    return found


def _at(results: Results, where: Sequence[str]) -> Any:
    value: Any = results
    for key in where:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _score(results: Results, where: Sequence[str]) -> str:
    interval = results.get(f"{where[0]}_interval") if len(where) == 1 else None
    return percent(_at(results, where)) + (f" ({percent(interval[0])}-{percent(interval[1])})" if interval else "")


def _chance(results: Results, places: Mapping[str, str], column: str, where: Sequence[str]) -> str:
    """Return one cell of a baseline row; columns of a mapping are looked up by their common header."""
    header = column.removesuffix(where[-1]) if len(where) > 1 else column
    return percent(results.get(places[header])) if header in places else ""


def percent(share: float | None) -> str:
    """Format a share as a percentage without the sign; empty for None."""
    return "" if share is None else f"{100 * share:.1f}"


def aligned(lines: Lines) -> str:
    """Align cells in columns, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _protocol(task: Task, evaluation: dict[str, Any]) -> str:
    text = task.protocol.format_map({**evaluation["settings"], **evaluation["results"]})
    return textwrap.fill(f"{text}; all values in percent", LINE)


def _parts_of(task: Task, results: Results) -> str:
    """Return a table of the parts that the scores are averaged over, such as sequences."""
    if task.parts is None:
        return ""
    header, key, columns = task.parts
    lines = [[header, *columns]]
    for name, part in results[key].items():
        values = (part.get(where) for where in columns.values())
        lines.append([name, *(str(value) if isinstance(value, int) else percent(value) for value in values)])
    return aligned(lines)


def _notes(named: Mapping[str, dict[str, Any]]) -> list[str]:
    notes = []
    for name, evaluation in named.items():
        results = evaluation["results"]
        if results.get("num_unreadable"):
            notes.append(f"{name}: skipped {results['num_unreadable']} unreadable files.")
        if results.get("k_lowered_to"):
            notes.append(f"{name}: k is at most {results['k_lowered_to']}, the number of training images.")
    return notes


def name_encoder(given: str, source: str) -> str:
    """Return an encoder's name for the table: the given name, and for a run its checkpoint."""
    checkpoint = PurePosixPath(source).name
    return given if given.rstrip("/").endswith(checkpoint) else f"{given} ({checkpoint})"
