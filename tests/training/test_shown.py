"""What a training shows in the launching process, stage by stage."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import dora_ray
from dora_ray.config import load_config
from dora_ray.store.ingest import IngestProgress
from dora_ray.training.shown import TrainingProgress


def ingested(done: int) -> IngestProgress:
    return IngestProgress(
        videos=1, segments=4, done_segments=done, frames=40, done_frames=10 * done, missing=0, seconds=2.0
    )


@pytest.fixture(autouse=True)
def _no_pause_between_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("dora_ray.progress.LOG_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="dora_ray.progress")


def test_each_stage_says_what_one_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    with TrainingProgress(load_config("tiny"), enabled=True) as shown:
        shown.ingest(ingested(4))
        shown.starting()
        shown.event({"event": "start", "step": 0})
        shown.metrics({"step": 40, "loss": 5.0, "step_seconds": 0.5, "exposed_wait_seconds": 0.1})
        shown.event({"event": "start", "step": 30})
    assert caplog.messages == [
        "ingest: 4/4 segments (100%), 20.0 frames/s",
        "train: starting 2 workers",
        "train: reading the first clips",
        "train: 40/400 steps (10%), loss 5.0000, data wait 20%",
        "train: continuing from step 30",
    ]


def test_an_ingest_beside_the_training_is_a_field_of_its_line(caplog: pytest.LogCaptureFixture) -> None:
    with TrainingProgress(load_config("tiny", "cluster.num_workers=[1, 2]"), enabled=True) as shown:
        shown.starting()
        shown.ingest(ingested(1))
        shown.metrics({"step": 40})
    shown.ingest(ingested(4))
    assert [message.partition(", ETA")[0] for message in caplog.messages] == [
        "train: starting 1 to 2 workers",
        "train: 0/400 steps (0%), ingested 1/4 segments",
        "train: 40/400 steps (10%), ingested 1/4 segments",
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_training_from_python_is_shown_unless_told_not_to(
    tmp_path: Path, small: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config("tiny", *small, "optim.steps=2", "optim.warmup_steps=0")
    seen: list[int] = []
    dora_ray.train(config, out=tmp_path / "a", on_metrics=lambda line: seen.append(line["step"]))
    said = [message for message in caplog.messages if message.startswith("train: ")]
    assert said[0].startswith("train: starting")
    assert said[-1].startswith("train: 2/2 steps (100%)")
    assert seen[-1] == 2
    caplog.clear()
    dora_ray.train(config, out=tmp_path / "b", progress=False)
    assert [record for record in caplog.records if record.name == "dora_ray.progress"] == []
