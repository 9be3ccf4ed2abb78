"""Asks pip-audit whether a locked version has a known vulnerability. Run it through `make audit`.

Exit status 1 names what was found and is not excepted in audit-exceptions.toml, where each exception has its reason.
Where the database of vulnerabilities cannot be reached (a machine without a way out), it says so and passes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

LOCK, EXCEPTIONS = Path("requirements.lock"), Path("audit-exceptions.toml")


def judge(dependencies: list[dict[str, Any]], exceptions: dict[str, str]) -> tuple[int, list[str]]:
    """Return the exit status and what to say.

    Args:
        dependencies: as pip-audit writes them: name, and either skip_reason or version and vulns.
        exceptions: reasons by a vulnerability's id.
    """
    audited = [one for one in dependencies if "skip_reason" not in one]
    if not audited:
        return 0, ["audit: the database of vulnerabilities knows none of the packages from here; nothing was checked"]
    found = [(one, vulnerability) for one in audited for vulnerability in one["vulns"]]
    said, bad = [], 0
    for one, vulnerability in found:
        names = {vulnerability["id"], *vulnerability.get("aliases", [])}
        reason = next((exceptions[name] for name in sorted(names) if name in exceptions), None)
        fixed = ", ".join(vulnerability.get("fix_versions", [])) or "no version yet"
        bad += reason is None
        said.append(f"{one['name']} {one['version']}: {vulnerability['id']}; " + (reason or f"fixed in {fixed}"))
    skipped = len(dependencies) - len(audited)
    said.append(
        f"audit: {len(audited)} packages checked, {skipped} unknown, {len(found)} known problems, {bad} not excepted"
    )
    return int(bad > 0), said


def known_exceptions(path: Path) -> dict[str, str]:
    """Reasons by a vulnerability's id."""
    return {one["id"]: one["reason"] for one in tomllib.loads(path.read_text(encoding="utf-8")).get("exception", [])}


def ask(command: list[str]) -> list[dict[str, Any]] | None:
    """What pip-audit found of each package; None where its database cannot be reached."""
    with tempfile.TemporaryDirectory() as folder:
        pins, result = Path(folder, "pins.txt"), Path(folder, "result.json")
        # Markers of a platform are left out: what any platform installs is looked at.
        lines = LOCK.read_text(encoding="utf-8").splitlines()
        pins.write_text("\n".join(line.partition(" ;")[0] for line in lines if not line.startswith("#")))
        options = [
            "-r",
            str(pins),
            "--no-deps",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "-f",
            "json",
            "-o",
            str(result),
        ]
        try:
            subprocess.run([*command, *options], capture_output=True, check=False, timeout=600)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return json.loads(result.read_text())["dependencies"] if result.exists() else None


def main(command: list[str]) -> int:
    """Audit the lock with pip-audit, whose command is given."""
    dependencies = ask(command)
    if dependencies is None:
        print("audit: the database of vulnerabilities cannot be reached from here; nothing was checked")
        return 0
    status, said = judge(dependencies, known_exceptions(EXCEPTIONS))
    print("\n".join(said))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
