"""dora-ray sweep."""

from __future__ import annotations

import argparse
import functools
import shlex
from typing import TYPE_CHECKING

from dora_ray import files
from dora_ray.commands.output import write, write_facts
from dora_ray.errors import DoRAError
from dora_ray.progress import Stages

if TYPE_CHECKING:
    from dora_ray.tuning.progress import SweepProgress


def run(options: argparse.Namespace) -> None:
    """Run a sweep and print its verdict; with --dry-run print a forecast instead.

    Raises:
        DoRAError: a trial has failed; the results of the others are written.
    """
    if options.dry_run:
        _dry_run(options)
        return
    from dora_ray.reporting.analysis import analyze, verdict
    from dora_ray.training.shown import show_ingest
    from dora_ray.tuning.baseline import read_baseline
    from dora_ray.tuning.results import read_spec
    from dora_ray.tuning.sweep import sweep

    with Stages() as stages:

        def on_progress(progress: SweepProgress) -> None:
            ended = f"{len(progress.ended)}/{progress.trials}"
            failed = sum(status == "failed" for status in progress.ended.values())
            shown, waiting = stages.at("sweep", "steps"), len(progress.waiting)
            if progress.eta_seconds is None and waiting:
                shown.say(f"{waiting} trial{'s' if waiting > 1 else ''} of {progress.trials}: reading the first clips")
                return
            shown.update(
                step=progress.steps_done,
                total=progress.steps,
                trials=ended,
                failed=failed or None,
                starting=waiting or None,
            )

        result = sweep(
            options.file,
            *options.overrides,
            out=options.out,
            resume=options.resume,
            on_progress=on_progress,
            on_ingest=functools.partial(show_ingest, stages),
        )
    counts = {status: sum(row.status == status for row in result.results) for status in ("done", "stopped", "failed")}
    write_facts(
        {
            "sweep": result.path,
            "trials": ", ".join(f"{count} {status}" for status, count in counts.items() if count),
            "table": files.join(result.path, "results.csv"),
            "report": files.join(result.path, "report.html"),
        }
    )
    write("\n" + verdict(analyze(result.results, read_spec(result.path), read_baseline(result.path))))
    if counts["failed"]:
        first = next(row for row in result.results if row.status == "failed")
        again = shlex.join(["dora-ray", "sweep", options.file, *options.overrides, "--resume", "--out", result.path])
        raise DoRAError(
            f"{counts['failed']} of {len(result.results)} trials failed. The first, {first.name}: {first.error}. "
            f"Run them again: {again}"
        )


def _dry_run(options: argparse.Namespace) -> None:
    from dora_ray.tuning.forecast import forecast

    write_facts(forecast(options.file, *options.overrides, out=options.out, resume=options.resume))
