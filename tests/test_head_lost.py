"""A head is lost in the middle of a training: the same command on a new cluster goes on from storage."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.heads import BIN, call, ray_head

WAIT_SECONDS, JOB_SECONDS = 900, 1200  # on a busy machine a process of Ray takes minutes to start


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_a_job_goes_on_on_a_new_cluster(small: tuple[str, ...], tmp_path: Path):
    run = tmp_path / "shared" / "run"
    words = ["submit", "train", "tiny", *small, "cluster.num_workers=1", "optim.steps=300", "optim.warmup_steps=20"]
    words += ["run.checkpoint_seconds=1", "--out", str(run), "--working-dir", str(_empty(tmp_path / "project"))]
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with ray_head(tmp_path / "first") as head:
        started = call([str(BIN / "dora-ray"), *words, "--no-wait", "--address", head.url], head.environment)
        assert started.returncode == 0, started.stderr
        deadline = time.monotonic() + WAIT_SECONDS
        while not (run / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline, (tmp_path / "first" / "head.log").read_text()[-3000:]
            time.sleep(0.1)
        os.killpg(head.process.pid, signal.SIGKILL)
    saved = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert 0 < saved < 300, "it was to be lost in the middle"
    with ray_head(tmp_path / "second") as head:
        done = call([str(BIN / "dora-ray"), *words, "--address", head.url], head.environment, timeout=JOB_SECONDS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    begun = [event["step"] for event in events if event["event"] == "start"]
    assert begun[0] == 0
    assert begun[-1] >= saved
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 300


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
