"""dora-ray doctor."""

from __future__ import annotations

import argparse

from dora_ray.commands.output import write
from dora_ray.errors import DoRAError


def run(options: argparse.Namespace) -> None:
    """Check this machine."""
    from dora_ray.doctor import examine

    findings = examine()
    marks = {True: "ok     ", False: "PROBLEM", None: "-      "}
    write("\n".join(f"{marks[finding.good]}  {finding.name:<14} {finding.text}" for finding in findings))
    wrong = [finding for finding in findings if finding.good is False]
    if wrong:
        write("\n" + "\n".join(f"{finding.name}: {finding.remedy}" for finding in wrong))
        raise DoRAError(
            f"{len(wrong)} problem{'s' * (len(wrong) > 1)} found: {', '.join(finding.name for finding in wrong)}"
        )
