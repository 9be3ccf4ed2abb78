"""Files for people who change the package: the hosted CI and the commit hooks run what a machine of one's own runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def recipe(target: str) -> list[str]:
    """Return the commands of a target of the Makefile, as `make` would run them."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def workflow() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text()))


def test_the_hosted_ci_runs_commands_that_are_there() -> None:
    jobs = workflow()["jobs"]
    run = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in run
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    targets = [command.removeprefix("make ") for command in run if command.startswith("make ")]
    assert targets == ["coverage"]
    assert any("coverage run -m pytest" in line for line in recipe("coverage"))
    assert all(job["timeout-minutes"] <= 120 for job in jobs.values())


def test_the_hosted_ci_builds_the_site_with_what_the_extra_installs() -> None:
    (install,) = [
        step["run"] for step in workflow()["jobs"]["docs"]["steps"] if step.get("run", "").startswith("pip install")
    ]
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^docs = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert shlex.split(install)[2:] == re.findall(r'^    "([^"]+)"', extra, re.MULTILINE)


@pytest.mark.parametrize("tool", ["ruff check", "ruff format --check", "mypy", "lint-imports"])
def test_the_commit_hooks_are_the_linters_of_make_lint(tool: str) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is downloaded"
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert any(entry.startswith(f".venv/bin/{tool}") for entry in entries)
    assert any(line.startswith(f".venv/bin/{tool}") for line in recipe("lint"))


def test_make_test_counts_no_lines() -> None:
    assert not any("coverage" in line for line in recipe("test")), "counting would slow it down"
