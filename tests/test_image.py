"""The images: the Dockerfile's rules, and its steps, run in a fresh virtual environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "image.sh"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def script(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    return subprocess.run([str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_every_image_runs_as_nobody_in_particular_and_by_the_script():
    stages = re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, flags=re.M)
    assert [name for _, name in stages] == ["base", "cpu-packages", "cuda-packages", "cpu", "cuda"]
    assert DOCKERFILE.count("\nUSER ") == 1, "set once, in the base, and never back to root"
    assert "\nUSER 1000\n" in DOCKERFILE
    installs = re.findall(r"^RUN (.*)", DOCKERFILE, flags=re.M)
    assert sum("src/scripts/image.sh" in line for line in installs) == 4
    assert "pip install" not in DOCKERFILE


def test_what_is_copied_is_let_through_and_nothing_else():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        word for line in re.findall(r"^COPY --chown=ray:ray (.*)", DOCKERFILE, flags=re.M) for word in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_the_tags_are_those_of_the_clusters():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)[1]
    images = yaml.safe_load((ROOT / "cluster.yaml").read_text())["metadata"]["images"]
    assert images == {kind: f"REGISTRY/dora-ray:{version}-{kind}" for kind in ("cpu", "cuda")}
    dry = subprocess.run(["make", "-n", "image"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for kind in images:
        assert f"--target {kind} --tag dora-ray:{version}-{kind} ." in dry


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_make_an_environment_that_works(tmp_path: Path):
    """In a fresh environment that sees this one's packages: pip finds each at the pinned version, or would fetch it.

    What is installed anew is the project, from its source, as in the image. `make setup` installs the whole lock.
    """
    prefix = tmp_path / "prefix"
    subprocess.run([sys.executable, "-m", "venv", str(prefix)], check=True)
    (here,) = (path for path in sys.path if path.endswith("site-packages") and Path(path, "torch").is_dir())
    (site,) = prefix.glob("lib/python*/site-packages")
    (site / "here.pth").write_text(f"{here}\n")
    packages = script("packages", str(prefix))
    assert packages.returncode == 0, packages.stdout[-3000:] + packages.stderr[-3000:]
    assert "Requirement already satisfied: torch" in packages.stdout
    project = script("project", str(prefix))
    assert project.returncode == 0, project.stdout[-3000:] + project.stderr[-3000:]
    assert re.search(r"^torch .* ray 2\.60", project.stdout, flags=re.M)
    installed = {path.name.partition("-")[0] for path in site.glob("*.dist-info")}
    assert "dora_ray" in installed
    assert list((site / "dora_ray" / "recipes").glob("*.yaml")), "data files travel too"
    assert (site / "dora_ray" / "planning" / "figures.json").exists()
