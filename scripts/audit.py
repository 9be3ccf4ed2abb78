"""Check the locked versions for known vulnerabilities with pip-audit. Run it with `make audit`.

Exit status 1: there are vulnerabilities without an exception (and its reason) in audit-exceptions.toml. If the database
cannot be reached, as on a machine without network access, the script says so and passes.
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
    """Return the exit status and the lines to print.

    Args:
        dependencies: output of pip-audit: name, and either skip_reason or version and vulns.
        exceptions: vulnerability id -> reason.
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
    """Return the reasons of exceptions by vulnerability id."""
    return {one["id"]: one["reason"] for one in tomllib.loads(path.read_text(encoding="utf-8")).get("exception", [])}


def ask(command: list[str]) -> list[dict[str, Any]] | None:
    """Return pip-audit's result for each package; None if its database cannot be reached."""
    with tempfile.TemporaryDirectory() as folder:
        pins, result = Path(folder, "pins.txt"), Path(folder, "result.json")
        # Drop platform markers, so that the packages of all platforms are checked.
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
    """Audit the lock file with the given pip-audit command."""
    dependencies = ask(command)
    if dependencies is None:
        print("audit: the database of vulnerabilities cannot be reached from here; nothing was checked")
        return 0
    status, said = judge(dependencies, known_exceptions(EXCEPTIONS))
    print("\n".join(said))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
