"""dora-ray bench."""

from __future__ import annotations

import argparse

from dora_ray.commands.output import write_facts, write_json


def run(options: argparse.Namespace) -> None:
    """Measure, and print what was measured."""
    from importlib import import_module

    result = import_module(f"dora_ray.bench.{options.what}").run(quick=options.quick)
    write_json(options.json, result)
    write_facts(result)
