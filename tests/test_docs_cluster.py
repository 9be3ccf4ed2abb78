"""docs/cluster.md: every command in it names the test that runs it, or says that it was not run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dora_ray.cli import _parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = [line.strip() for line in TEXT.splitlines() if line.startswith("    ") and not line.startswith("     ")]


def test_there_are_commands():
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("line", COMMANDS)
def test_each_says_who_has_run_it(line):
    command, _, mark = line.rpartition(" # ")
    assert command, f"no mark: {line}"
    if not mark.strip().startswith("not run"):
        path = ROOT / mark.strip().partition(",")[0]
        words = shlex.split(command)
        told = words[2].rpartition(".")[2] if words[:2] == ["python", "-m"] else words[words[0] in {"ray", "dora-ray"}]
        assert re.search(rf"\b{told}\b", path.read_text()), f"{path} does not run `{told}`"


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("dora-ray ")])
def test_our_own_are_understood(line):
    words = shlex.split(line.rpartition(" # ")[0])[1:]
    assert _parse(words).handler


def test_files_that_are_named_are_there():
    names = re.findall(r"`((?:clusters|scripts|planning)/[\w.-]+\.(?:yaml|json|sh))`", TEXT)
    names += re.findall(r"file://(\S+)", TEXT)
    names += [word for line in COMMANDS for word in line.partition(" # ")[0].split() if word.startswith("clusters/")]
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name
