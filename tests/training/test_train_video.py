"""Trainings straight from the video, without a store: resumed or spread over workers, they end in the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import dora_ray
from dora_ray.errors import CheckpointError
from dora_ray.training.records.journal import read_history
from dora_ray.video.synthetic import make_video
from tests.conftest import SMALL
from tests.training.test_train_local import same, weights_of

DIRECT = (
    *SMALL,
    "data.source=video",
    "clip.avoid_cuts=false",
    "clip.stride_seconds=0.5",
    "data.stream_segment_seconds=1",
    "data.shuffle_segments=2",
    "run.checkpoint_seconds=0.001",
    "run.keep_checkpoints=9",
)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 seconds with a key frame every second."""
    path = tmp_path_factory.mktemp("film") / "walk.mp4"
    return make_video(path, width=160, height=96, num_frames=240, frames_per_second=24, seed=1, group_size=24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, film: Path) -> Path:
    """A small run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    config = dora_ray.load_config("tiny", *DIRECT, f"data.videos=[{film}]")
    assert dora_ray.train(config, out=run).metrics["step"] == 6
    return run


def test_nothing_of_the_video_is_stored(finished: Path) -> None:
    (folder,) = (finished.parent / "store").iterdir()
    assert [path.name for path in folder.iterdir()] == ["index.npz"]


def test_resumed_run_is_the_undisturbed_run(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "cut"
    shutil.copytree(finished, run)
    checkpoints = run / "checkpoints"
    for name in ("step-00000006", "step-00000005", "step-00000004"):
        shutil.rmtree(checkpoints / name, ignore_errors=True)
    (checkpoints / "latest").write_text("step-00000003\n")
    dora_ray.train(out=run, resume=True)
    assert same(weights_of(run), weights_of(finished))
    assert read_history(str(run)) == read_history(str(finished))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_give_the_same_bits(finished: Path, film: Path, tmp_path: Path) -> None:
    config = dora_ray.load_config("tiny", *DIRECT, f"data.videos=[{film}]", "cluster.num_workers=2")
    result = dora_ray.train(config, out=tmp_path / "run")
    assert result.metrics["world_size"] == 2
    assert same(weights_of(tmp_path / "run"), weights_of(finished))
    assert read_history(result.path) == read_history(str(finished))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.source=store", "clip.avoid_cuts=true"), "data.source: video in the checkpoint, None now"),
        (("data.shuffle_segments=3",), "data.shuffle_segments: 2 in the checkpoint, 3 now"),
    ],
)
@pytest.mark.usefixtures("ray_cluster")
def test_resume_from_another_source_is_refused(
    finished: Path, film: Path, overrides: tuple[str, ...], words: str
) -> None:
    config = dora_ray.load_config("tiny", *DIRECT, f"data.videos=[{film}]", *overrides)
    with pytest.raises(CheckpointError, match=words):
        dora_ray.train(config, out=finished, resume=True)
