"""Whole trainings in this process, on a real video: what they leave behind, and that resuming changes nothing."""

from __future__ import annotations

import errno
import json
import shlex
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import dora_ray
from dora_ray import files
from dora_ray.cli import main
from dora_ray.commands.words import load as load_words
from dora_ray.errors import CheckpointError, ConfigError, DivergenceError, VideoError
from dora_ray.store.frames import open_videos
from dora_ray.training import launch, loop
from dora_ray.training.inputs import frame_format
from dora_ray.training.records.journal import Journal, read_history, read_lines, read_metrics
from dora_ray.training.worlds import LocalWorld
from dora_ray.video.synthetic import make_video
from tests.conftest import BIKES, SMALL
from tests.training.records.test_journal import read_scalars

pytestmark = pytest.mark.usefixtures("ray_cluster")  # the ingest runs on it


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return safetensors.torch.load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store: Path, ray_cluster) -> Path:
    """A small run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    config = dora_ray.load_config("tiny", *SMALL, f"data.videos=[{BIKES}]", f"data.store={store}")
    lines: list[dict] = []
    result = dora_ray.train(config, out=run, on_metrics=lines.append)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert result.path == str(run)
    assert result.metrics["step"] == 6
    assert Path(result.checkpoint).name == "step-00000006"
    return run


def test_run_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "ledger.jsonl",
        "status.json",
        "tensorboard",
        "checkpoints",
    } <= names
    assert json.loads((finished / "status.json").read_text())["state"] == "done"
    assert [event["event"] for event in read_lines(str(finished / "events.jsonl"))][-1] == "end"
    scalars = read_scalars(str(finished))
    assert scalars["world_size"] == dict.fromkeys(range(1, 7), 1.0)
    assert scalars["exposed_wait_seconds"].keys() == scalars["loss"].keys() == set(range(1, 7))
    assert list(read_history(str(finished))) == list(range(6))
    assert dora_ray.load_config(yaml.safe_load((finished / "config.yaml").read_text())).optim.steps == 6


@pytest.mark.parametrize(("seconds", "reported"), [(0.0, [1, 2, 3, 4, 5, 6]), (3600.0, [1, 6])])
def test_ray_train_hears_of_few_of_many_steps(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, reported: list[int]
) -> None:
    """Each report waits for a health check of Ray Train's controller, seconds perhaps, where a step takes a tenth."""
    heard: list[float] = []
    monkeypatch.setattr(loop, "REPORT_SECONDS", seconds)
    monkeypatch.setattr(LocalWorld, "report", lambda world, metrics: heard.append(metrics["step"]))
    dora_ray.train(dora_ray.load_config("tiny", *small), out=tmp_path / "run")
    assert heard == reported


def test_checkpoint_folder(finished: Path) -> None:
    folder = finished / "checkpoints" / "step-00000006"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "state.pt", "meta.json"}
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["step"] == 6
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["bad_clips"] == []
    assert meta["plan_digest"]


def test_metrics_hold_what_collapse_would_show_in(finished: Path) -> None:
    line = read_metrics(str(finished))[-1]
    measures = "loss teacher_entropy teacher_kl_uniform center_norm mask_area object_overlap sinkhorn_residual"
    rates = "object_agreement clips_per_second exposed_wait_seconds lr"
    assert {*measures.split(), *rates.split()} <= line.keys()


def test_resumed_run_is_the_undisturbed_run(finished: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    run = tmp_path / "cut"
    short = dora_ray.load_config("tiny", *small, "run.checkpoint_seconds=0.001", "run.keep_checkpoints=9")
    dora_ray.train(short, out=run)
    checkpoints = run / "checkpoints"
    for name in ("step-00000006", "step-00000005", "step-00000004"):
        for path in sorted(checkpoints.glob(f"{name}/*")):
            path.unlink()
    (checkpoints / "latest").write_text("step-00000003\n")
    dora_ray.train(short, out=run, resume=True)
    assert same(weights_of(run), weights_of(finished))
    assert read_history(str(run)) == read_history(str(finished))
    attempts = {line["attempt"] for line in read_metrics(str(run)) if line["step"] > 3}
    assert attempts == {2}


def test_resume_without_configuration_takes_the_runs_own(finished: Path) -> None:
    before = weights_of(finished)
    assert dora_ray.train(out=finished, resume=True).metrics["step"] == 6
    assert same(before, weights_of(finished))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tracking.num_objects=2", "tracking.num_objects: 3 in the checkpoint, 2 now"),
        ("run.seed=1", "seed: 0 in the checkpoint, 1 now"),
        ("optim.slots=2", "optim.slots: 4 in the checkpoint, 2 now"),
        ("model.width=96", "width"),
    ],
)
def test_resume_with_another_plan_or_model_is_refused(
    finished: Path, small: tuple[str, ...], override: str, words: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(CheckpointError, match=words):
        dora_ray.train(dora_ray.load_config("tiny", *small, override), out=finished, resume=True)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_folder_in_use_is_refused(finished: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    config = dora_ray.load_config("tiny", *small)
    with pytest.raises(ConfigError, match=r"holds a run \(6 of 6 steps\)\. .*--resume.*--overwrite.*--out"):
        dora_ray.train(config, out=finished)
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="not a run of dora_ray"):
        dora_ray.train(config, out=tmp_path, overwrite=True)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"mine"


def test_ctrl_c_says_step_checkpoint_and_how_to_go_on(
    finished: Path, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "make_inputs", interrupt)
    config = dora_ray.load_config("tiny", *small)
    with pytest.raises(
        KeyboardInterrupt, match=rf"step 6 of 6; .*step-00000006\nContinue: .*--resume --out {finished}"
    ):
        dora_ray.train(config, out=finished, resume=True)
    with pytest.raises(KeyboardInterrupt, match=r"before the first checkpoint\. .*begin again\."):
        dora_ray.train(config, out=tmp_path / "run")


def test_divergence_is_named_and_recorded(tmp_path: Path, small: tuple[str, ...]) -> None:
    config = dora_ray.load_config("tiny", *small, "optim.lr=1e30", "optim.warmup_steps=0")
    with pytest.raises(DivergenceError, match=r"step \d: .* is not finite"):
        dora_ray.train(config, out=tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["error"] == "DivergenceError"


def test_video_shorter_than_a_clip(tmp_path: Path, small: tuple[str, ...]) -> None:
    config = dora_ray.load_config("tiny", *small, "clip.stride_seconds=20")
    with pytest.raises(VideoError, match=r"needs 20 s; lower"):
        dora_ray.train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_videos(tmp_path: Path, small: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"no video is named"):
        dora_ray.train(dora_ray.load_config("tiny", *small, "data.videos=[]"), out=tmp_path / "run")


def test_online_knn(tmp_path: Path, small: tuple[str, ...]) -> None:
    from dora_ray.video.synthetic import make_photo_classes

    make_photo_classes(tmp_path / "photos", seed=0)
    config = dora_ray.load_config(
        "tiny", *small, "optim.steps=2", f"evaluation.images={tmp_path / 'photos'}", "evaluation.max_images=40"
    )
    assert 0 <= dora_ray.train(config, out=tmp_path / "run").metrics["knn"] <= 1


def test_labeled_folder_is_checked_first(tmp_path: Path, small: tuple[str, ...]) -> None:
    config = dora_ray.load_config("tiny", *small, f"evaluation.images={tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match="nowhere"):
        dora_ray.train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unreadable_clips_are_recorded_and_bounded(tmp_path: Path, small: tuple[str, ...], monkeypatch) -> None:
    """A store whose first frames have vanished: training goes on without their clips, up to the bound."""
    from dora_ray.training import inputs

    plain = inputs.ingest_videos

    def without_a_frame(*arguments):
        (video,) = plain(*arguments)
        rows = video.rows.copy()
        rows[:3] = 10**6
        return [replace(video, rows=rows)]

    monkeypatch.setattr(inputs, "ingest_videos", without_a_frame)
    strict = dora_ray.load_config("tiny", *small)
    with pytest.raises(VideoError, match=r"clips could not be read.*bikes\.mp4 at \d"):
        dora_ray.train(strict, out=tmp_path / "strict")
    run = tmp_path / "lenient"
    dora_ray.train(dora_ray.load_config("tiny", *small, "data.max_bad_fraction=0.5"), out=run)
    bad = json.loads((run / "checkpoints" / "step-00000006" / "meta.json").read_text())["bad_clips"]
    assert bad
    assert bad == sorted(set(bad))
    assert all(0 <= number < 48 for number in bad)


def test_overwrite_begins_again(tmp_path: Path, small: tuple[str, ...], finished: Path) -> None:
    run = tmp_path / "run"
    config = dora_ray.load_config("tiny", *small)
    dora_ray.train(dora_ray.load_config("tiny", *small, "run.seed=7"), out=run)
    dora_ray.train(config, out=run, overwrite=True)
    assert same(weights_of(run), weights_of(finished))
    inside = dora_ray.load_config("tiny", *small, f"data.store={run / 'store'}")
    with pytest.raises(ConfigError, match="would remove"):
        dora_ray.train(inside, out=run, overwrite=True)


def test_run_behind_a_uri(small: tuple[str, ...]) -> None:
    run = f"memory://runs/{uuid.uuid4().hex}"
    result = dora_ray.train(dora_ray.load_config("tiny", *small, "optim.steps=2"), out=run)
    assert result.checkpoint == f"{run}/checkpoints/step-00000002"
    assert {"tensorboard", "metrics.jsonl", "ledger.jsonl"} <= set(files.list_names(run))
    assert dora_ray.train(out=run, resume=True).metrics["step"] == 2


def test_a_disk_that_takes_no_more_ends_a_run_with_what_could_not_be_written(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "flush", refuse)
    config = dora_ray.load_config("tiny", *small, "optim.steps=2", "optim.warmup_steps=2")
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left.*--resume"):
        dora_ray.train(config, out=tmp_path / "run")


def test_ingest_names_the_training_that_uses_its_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = make_video(tmp_path / "a walk [1].mp4", width=96, height=64, num_frames=20, frames_per_second=10, seed=0)
    store = str(tmp_path / "store")
    words = ["data", "ingest", str(film), "data.short_side=48", "--recipe", "tiny", "--store", store]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "12 frames per second, short side 48, quality 85 (recipe tiny)" in printed
    config = load_words(shlex.split(printed.partition("dora-ray train ")[2].splitlines()[0]))
    assert config is not None
    assert (config.data.videos, config.data.store) == ((str(film),), store)
    (stored,) = open_videos([str(film)], store=store, form=frame_format(config.data))
    assert (stored.missing, len(stored) > 0) == (0, True)
