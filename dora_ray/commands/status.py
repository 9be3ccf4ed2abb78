"""dora-ray status."""

from __future__ import annotations

import argparse
import datetime

from dora_ray import files
from dora_ray.commands.output import write, write_facts, write_json


def run(options: argparse.Namespace) -> None:
    """Print the status of a run or sweep, and the next command if it was killed."""
    if files.exists(files.join(options.run, "sweep.yaml")):
        _sweep(options)
    else:
        _run(options)


def _run(options: argparse.Namespace) -> None:
    from dora_ray.training.records.status import summarize

    facts = summarize(options.run)
    write_json(options.json, facts)
    ages = {
        name: f"{facts[name]:.0f} s ago" for name in ("last_checkpoint_seconds", "written_seconds") if name in facts
    }
    shown = facts | ages
    write_facts({name.replace("_", " ").removesuffix(" seconds"): value for name, value in shown.items()})
    go_on = f"Continue: dora-ray train --resume --out {options.run}"
    if facts["state"] == "dead":
        write(f"\nThe process that launched the run is gone: it was killed. {go_on}")
    elif facts["state"] == "silent":
        write(f"\nNothing was written for {facts['written_seconds']:.0f} s: the run was probably killed. {go_on}")


def _sweep(options: argparse.Namespace) -> None:
    from dora_ray.tuning.progress import summarize_sweep

    facts = summarize_sweep(options.run)
    write_json(options.json, facts)
    shown = dict(facts)
    running = shown.pop("running", {})
    if "eta_seconds" in shown:
        shown["eta"] = datetime.timedelta(seconds=shown.pop("eta_seconds"))
    if "written_seconds" in shown:
        shown["written"] = f"{shown.pop('written_seconds'):.0f} s ago"
    write_facts({name.replace("_", " "): value for name, value in shown.items()} | running)
    go_on = f"dora-ray sweep FILE.yaml --resume --out {options.run}"
    if facts["state"] == "dead":
        write(f"\nThe process that ran the sweep is gone: it was killed. Continue: {go_on}")
    elif facts["state"] in ("interrupted", "failed"):
        write(f"\nRun the missing and failed trials: {go_on}")
