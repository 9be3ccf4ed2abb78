"""Jobs on a local `ray start --head` that asks for a token, by `ray job submit` and by `dora-ray submit`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_ray.cluster.jobs import NO_AGENT
from tests.cluster.heads import BIN, Head, ask, call, ray_head

JOB_SECONDS = 1200
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as found:
        yield found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a recipe, and with what must not leave this machine."""
    folder = tmp_path / "project"
    (folder / "runs" / "old").mkdir(parents=True)
    (folder / "mine.yaml").write_text("base: tiny\noptim: {lr: 2.0e-3}\n")
    for name in (".env", "walk.mp4", "my_auth_token", "server.pem", "runs/old/config.yaml"):
        (folder / name).write_text("secret")
    return folder


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_trains_and_submitted_again_goes_on(
    head: Head, small: tuple[str, ...], project: Path, tmp_path: Path
):
    """By Ray's own command first, then by ours, as after a lost head: the same words, and the same folder."""
    assert ask(head.url, None) == 401, "without the token nobody gets in"
    run = tmp_path / "run"
    words = ["train", "mine.yaml", *small, "--out", str(run)]
    command = [str(BIN / "ray"), "job", "submit", "--address", head.url, "--working-dir", str(_shared(project)), "--"]
    command += ["dora-ray", *words, "cluster.num_workers=1", "optim.steps=2"]
    done = call(command, head.environment, timeout=JOB_SECONDS)
    while NO_AGENT in done.stderr:  # on a busy machine the agent starts later than the dashboard; ours waits for it
        time.sleep(1)
        done = call(command, head.environment, timeout=JOB_SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert str(run) in done.stdout, "what training prints reaches the submitter"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000002"
    assert "lr: 0.002" in (run / "config.yaml").read_text()
    words += ["cluster.num_workers=0", "optim.steps=4", "--address", head.url, "--working-dir", str(project)]
    again = call([str(BIN / "dora-ray"), "submit", *words], head.environment, timeout=JOB_SECONDS)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-2000:]
    assert "--resume" in again.stdout.splitlines()[0]
    assert "checkpoint  " in again.stdout, "what training prints reaches the submitter"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 2]
    uploaded = {path.name for folder in _working_dirs(head) for path in folder.rglob("*") if path.is_file()}
    assert "mine.yaml" in uploaded
    assert uploaded.isdisjoint({".env", "walk.mp4", "my_auth_token", "server.pem", "config.yaml"})


def _shared(project: Path) -> Path:
    """Return a copy of a project with nothing but its recipe, for Ray's command, which uploads all of a folder."""
    (project.parent / "shared").mkdir()
    shutil.copy(project / "mine.yaml", project.parent / "shared")
    return project.parent / "shared"


def _working_dirs(head: Head) -> list[Path]:
    return list(head.folder.glob("session_2*/runtime_resources/working_dir_files/*"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_ends_as_its_command_does(head: Head, project: Path, tmp_path: Path):
    words = [str(BIN / "dora-ray"), "submit", "--address", head.url, "--working-dir", str(project)]
    failed = call([*words, "data", "index", "missing.mp4"], head.environment, timeout=JOB_SECONDS)
    assert failed.returncode == 3, failed.stdout + failed.stderr
    assert "missing.mp4" in failed.stdout
    mistaken = call([*words, "train", "mine.yaml", "optim.stepz=2"], head.environment)
    assert mistaken.returncode == 2
    assert "Did you mean optim.steps?" in mistaken.stderr
    (tmp_path / "other").write_text("0" * 64)
    refused = call([*words, "doctor"], head.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")})
    assert refused.returncode == 5
    assert "refuses this machine" in refused.stderr
    started = call([*words, "--no-wait", "--name", "look", "data", "index", "missing.mp4"], head.environment)
    assert started.returncode == 0
    assert "ray job logs --follow" in started.stdout
