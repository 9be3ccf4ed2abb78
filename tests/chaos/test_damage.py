"""Faults in files: the damage done, and reports of trials whose run or comparison fails."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from dora_ray.chaos import damage, trial
from dora_ray.chaos.damage import Hang, choose_hang, cut_newest_checkpoint
from dora_ray.chaos.training import SMALL, StalledError, make_training_video
from dora_ray.chaos.trial import Laboratory, Trial
from dora_ray.checkpoints import META, MODEL, STATE
from dora_ray.config import Config, load_config
from dora_ray.training.inputs import ingest_videos, make_plan


class Ended:
    """Training that ends successfully at once."""

    def __init__(self, *_: object, **__: object) -> None:
        self.run = Path()

    def wait(self, *_: object, **__: object) -> None:
        pass

    def finish(self, **_: object) -> int:
        return 0

    def kill(self) -> None:
        pass


@pytest.fixture
def lab(tmp_path: Path, monkeypatch) -> Laboratory:
    """Laboratory in which every run but the undisturbed one succeeds."""

    def reference(self: Laboratory, steps: int) -> Path:
        raise StalledError("it did not end")

    monkeypatch.setattr(trial, "Training", Ended)
    monkeypatch.setattr(trial, "LocalNodes", lambda count: nullcontext(SimpleNamespace(address="")))
    monkeypatch.setattr(trial, "cut_newest_checkpoint", lambda *_, **__: "a note")
    monkeypatch.setattr(Laboratory, "_fill_store", lambda *_: None)
    monkeypatch.setattr(Laboratory, "reference", reference)
    return Laboratory(tmp_path, tmp_path / "video.mp4")


def test_an_undisturbed_run_that_fails_is_a_problem_of_its_trial(lab: Laboratory) -> None:
    assert lab.run_alone("truncate", seed=0) == Trial("truncate", problems=["it did not end"])
    assert lab.run_live("none", [], seed=0) == Trial("none", problems=["it did not end"])


def test_the_first_failure_is_reported_first(lab: Laboratory, monkeypatch) -> None:
    monkeypatch.setattr(Ended, "finish", lambda self, **_: 1)
    monkeypatch.setattr(Ended, "tail", lambda self: "out of memory", raising=False)
    ended = "the training ended with status 1: out of memory"
    assert lab.run_live("none", [], seed=0).problems == [ended, "it did not end"]


@pytest.mark.parametrize(("step", "status"), [(4, 0), (0, 0), (8, 0), (4, 3)])
def test_a_cut_checkpoint_must_cost_the_one_before_nothing(tmp_path: Path, monkeypatch, step: int, status: int) -> None:
    run = tmp_path / "run"
    for number in (4, 8):
        folder = run / "checkpoints" / f"step-{number:08d}"
        folder.mkdir(parents=True)
        for name in (MODEL, STATE, META):
            (folder / name).write_text("0" * 100)

    def launch(*_: object, **__: object) -> tuple[int, str]:
        (run / "events.jsonl").write_text(json.dumps({"event": "start", "step": step, "time": 0.0}) + "\n")
        return status, "said"

    monkeypatch.setattr(damage, "Training", Ended)
    monkeypatch.setattr(damage, "launch", launch)
    if (step, status) == (4, 0):
        assert "resumed from step-00000004" in cut_newest_checkpoint(run, (), seed=0)
    else:
        with pytest.raises(StalledError, match=f"status {status} and did not start at step-0+4.* steps .{step}"):
            cut_newest_checkpoint(run, (), seed=0)
    cut = [path.stat().st_size for path in (run / "checkpoints" / "step-00000008").iterdir()]
    assert sorted(cut) == [50, 50, 100]


def hanging_clips(config: Config, store: str, hang: Hang) -> list[int]:
    """Return, for each step up to the last one, the number of clips that need the hanging file."""
    video = ingest_videos(config, store)[0]
    plan = make_plan(config, [video])
    (frames,) = (frames for file, frames in damage._files(video) if file == hang.file)
    slots = range(config.optim.slots)
    return [
        sum(not frames.isdisjoint(clip.frames) for slot in slots for clip in plan.slot_clips(step, slot))
        for step in range(hang.stop + 1)
    ]


@pytest.mark.ray
def test_a_file_is_chosen_whose_first_clips_are_only_counted(ray_cluster, tmp_path: Path) -> None:
    limits = (f"data.segment_seconds={damage.SEGMENT_SECONDS}", f"data.max_bad_fraction={damage.BAD_FRACTION}")
    config = load_config("tiny", *SMALL, f"data.videos=[{make_training_video(tmp_path)}]", *limits)
    hang = choose_hang(config, str(tmp_path / "store"))
    clips = hanging_clips(config, str(tmp_path / "store"), hang)
    assert hang.file.is_file()
    assert sum(clips[:-1]) == hang.counted in (1, 2)
    assert sum(clips) > 2
    assert any(clips[: -damage.STEPS_BETWEEN])
    assert all(str(tmp_path / "video.mp4") in place for place in hang.places)
