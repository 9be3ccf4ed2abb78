"""dora-ray status."""

from __future__ import annotations

import argparse

from dora_ray.commands.output import write, write_facts, write_json


def run(options: argparse.Namespace) -> None:
    """Print how a run is doing, and what to do when it has most likely been killed."""
    from dora_ray.training.records.status import summarize

    facts = summarize(options.run)
    write_json(options.json, facts)
    ages = {
        name: f"{facts[name]:.0f} s ago" for name in ("last_checkpoint_seconds", "written_seconds") if name in facts
    }
    shown = facts | ages
    write_facts({name.replace("_", " ").removesuffix(" seconds"): value for name, value in shown.items()})
    if facts["state"] == "silent":
        write(
            f"\nNothing has been heard for {facts['written_seconds']:.0f} s: the run was probably killed. "
            f"Go on with: dora-ray train --resume --out {options.run}"
        )
