"""README and docs: commands are understood, settings exist, links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

import dora_ray
from dora_ray.cli import _parse
from dora_ray.commands.words import load
from dora_ray.config import Config
from dora_ray.config_source import flatten
from dora_ray.tuning.space import load_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [
    (page.name, line.strip())
    for page in PAGES
    if page.name != "cluster.md"
    for line in page.read_text().splitlines()
    if line.startswith("    dora-ray ")
]
KEYS = flatten(Config().model_dump(mode="json"))
SETTING = re.compile(rf"\b((?:{'|'.join({key.split('.')[0] for key in KEYS})})\.[a-z_]+)(?:=|`|,| )")


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_understood(page: str, line: str):
    words = shlex.split(line, comments=True)[1:]
    options = _parse(words)
    assert options.handler
    if words[0] in ("train", "plan") and "--resume" not in words:
        assert load(options.words) is not None
    if words[0] == "sweep":
        assert load_sweep(ROOT / options.file).space


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path):
    code = re.findall(r"`([^`\n]+)`", page.read_text())
    named = {found for text in code for found in SETTING.findall(text + "`")}
    files = {name for name in named if name.endswith((".json", ".yaml", ".py"))}
    assert named - KEYS.keys() - files == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_readme_is_short_and_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    named = re.findall(r"^ {4}(dora_ray/\S+\.py) ", text, re.MULTILINE)
    assert len(named) == 6
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readmes_python_names_what_there_is():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (first, *_) = ast.parse(snippet).body
    assert isinstance(first, ast.ImportFrom)
    assert first.module == "dora_ray"
    assert {name.name for name in first.names} <= set(dora_ray.__all__)


def test_every_page_is_in_the_sites_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = sorted(page for entry in site["nav"] for page in entry.values())
    assert listed == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
