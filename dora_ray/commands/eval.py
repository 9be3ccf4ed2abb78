"""dora-ray eval."""

from __future__ import annotations

import argparse

from dora_ray.commands.output import write_facts, write_json


def run(options: argparse.Namespace) -> None:
    """Evaluate an encoder and print the results."""
    from dora_ray.config_source import parse_override
    from dora_ray.evaluation import evaluate

    settings = dict(parse_override(word) for word in options.options)
    result = evaluate(options.checkpoint, options.task, data=options.data, **settings)
    write_json(options.json, result)
    write_facts(
        {"task": result["task"], "checkpoint": result["checkpoint"], "data": result["data"], **result["results"]}
    )
