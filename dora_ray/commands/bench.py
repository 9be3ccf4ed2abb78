"""dora-ray bench."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from dora_ray.commands import words
from dora_ray.commands.output import write_facts, write_json
from dora_ray.errors import ConfigError
from dora_ray.progress import Stages


def run(options: argparse.Namespace) -> None:
    """Run a benchmark and print its result."""
    result = _measure(options)
    write_json(options.json, result)
    parts = {f"  {name}": seconds for name, seconds in result.get("parts", {}).items()}
    write_facts({name: value for name, value in result.items() if name != "parts"})
    if parts:
        write_facts({"seconds by part": "", **parts})


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    bench: Any = import_module(f"dora_ray.bench.{options.what}")
    if options.what == "step":
        with Stages() as stages:
            return dict(
                bench.run(
                    quick=options.quick,
                    config=words.load(options.words),
                    device_name=options.device,
                    report=lambda done, total, name: stages.at("bench step", "measurements").update(
                        step=done, total=total, now=name
                    ),
                )
            )
    if options.words:
        raise ConfigError(f"bench {options.what} takes no configuration ({' '.join(options.words)}); bench step does")
    if options.device:
        raise ConfigError(f"bench {options.what} runs on CPUs only: --device={options.device} is for bench step")
    return dict(bench.run(quick=options.quick))
