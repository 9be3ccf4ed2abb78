"""dora-ray doctor."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from dora_ray.commands.output import write, write_json
from dora_ray.errors import DoRAError


def run(options: argparse.Namespace) -> None:
    """Check this machine, and the cluster if there is one."""
    from dora_ray import files
    from dora_ray.doctor.cluster import examine_cluster
    from dora_ray.doctor.machine import examine

    address = options.address or os.environ.get("RAY_ADDRESS")
    paths = [files.absolute(path) for path in options.paths]
    findings = examine(() if address else paths)
    if address:
        findings += examine_cluster(address, paths)
    marks = {True: "ok     ", False: "PROBLEM", None: "-      "}
    write("\n".join(f"{marks[finding.good]}  {finding.name:<14} {finding.text}" for finding in findings))
    write_json(options.json, [asdict(finding) for finding in findings])
    wrong = [finding for finding in findings if finding.good is False]
    if wrong:
        write("\n" + "\n".join(f"{finding.name}: {finding.remedy}" for finding in wrong))
        raise DoRAError(
            f"{len(wrong)} problem{'s' * (len(wrong) > 1)} found: {', '.join(finding.name for finding in wrong)}"
        )
