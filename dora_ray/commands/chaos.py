"""dora-ray chaos."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dora_ray.commands.output import write, write_json
from dora_ray.errors import DoRAError
from dora_ray.progress import Stages

if TYPE_CHECKING:
    from rich.table import Table


def run(options: argparse.Namespace) -> None:
    """Inject faults, print their cost, and fail unless all checks pass."""
    from rich.console import Console

    from dora_ray.chaos.run import chaos

    with Stages() as stages:

        def on_trial(name: str, number: int, total: int) -> None:
            stages.at("chaos", "runs").update(step=number - 1, total=total, now=name)

        faults = options.faults.split(",") if options.faults else []
        result = chaos(
            faults,
            seed=options.seed,
            count=options.count,
            quick=options.quick,
            compare=options.compare,
            on_trial=on_trial,
        )
    write_json(options.json, result)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140).print(table(result["trials"]))
    notes = [
        f"{trial['name']}: {text}" for trial in result["trials"] for text in (*_recoveries(trial), *trial["notes"])
    ]
    problems = [f"{trial['name']}: {text}" for trial in result["trials"] for text in trial["problems"]]
    if notes:
        write("\n".join(notes))
    if problems:
        write("\n".join(problems))
        raise DoRAError(f"{len(problems)} checks failed; the runs' files are in {result['folder']}")
    write("All checks passed.")


def _recoveries(trial: dict[str, Any]) -> list[str]:
    """Return a line for each recovery: the time without a step, by part."""
    return [
        f"step {row['step']}, {row['fault']}, {row['recovered_seconds']:.1f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in row["parts"].items())
        for row in trial["rows"]
        if row["parts"] and row["recovered_seconds"] is not None
    ]


def table(trials: list[dict[str, Any]]) -> Table:
    """Return a table with a row for each fault; a run without faults gets one row."""
    from rich.table import Table

    columns = (
        "fault",
        "at step",
        "workers",
        "recovered in s",
        "steps lost",
        "work lost in s",
        "clips lost",
        "clips repeated",
        "weights equal (max difference)",
    )
    shown = Table(*columns)
    for trial in trials:
        difference = trial["max_difference"]
        equal = "-" if difference is None else f"{'yes' if difference == 0 else 'NO'} ({difference:g})"
        for row in trial["rows"]:
            recovered = row["recovered_seconds"]
            shown.add_row(
                row["fault"],
                str(row["step"]),
                " > ".join(str(size) for size in row["world_sizes"]),
                "never" if recovered is None else f"{recovered:.1f}",
                str(row["steps_lost"]),
                f"{row['work_lost_seconds']:.1f}",
                str(row["clips_lost"]),
                str(row["clips_repeated"]),
                equal,
            )
        if not trial["rows"]:
            shown.add_row(trial["name"], *["-"] * 7, equal)
    return shown
