"""dora-ray sweep."""

from __future__ import annotations

import argparse

from dora_ray import files
from dora_ray.commands.output import Stages, write, write_facts


def run(options: argparse.Namespace) -> None:
    """Run a sweep and print its best point."""
    from dora_ray.reporting.pages import answer
    from dora_ray.tuning.space import expand, load_sweep
    from dora_ray.tuning.sweep import sweep

    spec = load_sweep(options.file, *options.overrides)
    total = len(expand(spec))
    ended: list[str] = []
    with Stages() as stages:

        def on_trial(name: str, status: str) -> None:
            ended.append(name)
            stages.at("sweep", "trials").update(step=len(ended), total=total, last=f"{name} {status}")

        result = sweep(options.file, *options.overrides, out=options.out, resume=options.resume, on_trial=on_trial)
    counts = {status: sum(row.status == status for row in result.results) for status in ("done", "stopped", "failed")}
    tally = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    write_facts(
        {
            "sweep": result.path,
            "trials": tally,
            "table": files.join(result.path, "results.csv"),
            "report": files.join(result.path, "report.html"),
        }
    )
    write("\n" + answer(result.results, spec))
