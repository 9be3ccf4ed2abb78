"""dora-ray report."""

from __future__ import annotations

import argparse

from dora_ray.commands.output import write


def run(options: argparse.Namespace) -> None:
    """Write a report."""
    from dora_ray.reporting.pages import report

    write(str(report(options.path)))
