"""What keeps a fresh clone installable: the lock, the ranges, the package's files, and nothing of one machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dora_ray

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
EXTRAS = PROJECT["project"]["optional-dependencies"]
IN_CI = [*PROJECT["project"]["dependencies"], *EXTRAS["demo"], *EXTRAS["dev"], *EXTRAS["s3"]]


def tracked() -> list[Path]:
    """Files that git knows or would take."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)
    return [path for name in listing.stdout.splitlines() if (path := ROOT / name).is_file()]


def test_the_lock_holds_names_and_exact_versions_alone():
    assert len(LOCK) > 100
    for requirement in map(Requirement, LOCK):
        assert requirement.url is None
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert "*" not in str(requirement.specifier)


def test_the_lock_pins_everything_that_ci_asks_for_within_its_range():
    pins = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, LOCK)}
    assert len(pins) == len(LOCK)
    for requirement in map(Requirement, IN_CI):
        pin = pins[canonicalize_name(requirement.name)]
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version), f"{pin} is outside of {requirement}"


def test_what_is_installed_is_what_is_locked():
    for requirement in map(Requirement, LOCK):
        if requirement.marker is None or requirement.marker.evaluate():
            (specifier,) = requirement.specifier
            assert version(requirement.name).split("+")[0] == specifier.version, requirement.name


def test_wheels_of_one_platform_are_asked_for_there_alone():
    bound = [Requirement(line) for line in LOCK if line.startswith(("nvidia-", "cuda-", "triton", "decord"))]
    assert len(bound) > 10
    for elsewhere in (
        {"sys_platform": "darwin", "platform_machine": "arm64"},
        {"sys_platform": "linux", "platform_machine": "aarch64"},
    ):
        assert not any(requirement.marker.evaluate(elsewhere) for requirement in bound)
    decord = next(Requirement(text) for text in PROJECT["project"]["dependencies"] if text.startswith("decord"))
    assert not decord.marker.evaluate({"sys_platform": "darwin", "platform_machine": "arm64"})
    assert decord.marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"})


def test_every_dependency_says_what_it_is_for():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in [*PROJECT["project"]["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]:
        line = next(line for line in text.splitlines() if f'"{requirement}"' in line)
        assert len(line.partition("#")[2].strip()) > 10, line


def test_the_version_is_written_once():
    assert PROJECT["project"]["version"] == dora_ray.__version__ == version("dora-ray")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dora_ray.__version__
    assert "arXiv:2310.08584" in str(citation["preferred-citation"])


def test_files_that_are_not_python_ship_with_the_package():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["dora_ray"]
    package = ROOT / "dora_ray"
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    there = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert there == shipped


MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|opt|home/\w+|Users/\w+|farm)/|/tmp/brief")
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|registry\.npmjs|download\.pytorch\.org|--(?:extra-)?index-url", re.IGNORECASE
)


def test_no_file_names_one_machine_or_a_registry():
    here = Path(__file__).resolve()  # holds the patterns themselves
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            assert path.stat().st_size < 200_000, f"{path} is a large binary file"
            continue
        hits = (pattern.search(text) for pattern in (MACHINE_PATH, REGISTRY) if path != here)
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in hits if hit]
    assert found == []
