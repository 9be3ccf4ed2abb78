"""dora-ray export."""

from __future__ import annotations

import argparse

from dora_ray.commands.output import write


def run(options: argparse.Namespace) -> None:
    """Export an encoder."""
    from dora_ray.weights import export

    write(str(export(options.checkpoint, options.out)))
