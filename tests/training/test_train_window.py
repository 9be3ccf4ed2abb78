"""Trainings that begin while the ingest runs: resumed or spread over workers, they end in the same bits."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

import dora_ray
from dora_ray.errors import CheckpointError, VideoError
from dora_ray.store import ingest as store_ingest
from dora_ray.training import ingest_beside, inputs
from dora_ray.training.inputs import in_order_of_need
from dora_ray.training.records.journal import read_history, read_metrics
from dora_ray.video.synthetic import make_video
from tests.conftest import SMALL
from tests.training.test_train_local import same, weights_of

WINDOW = (
    *SMALL,
    "clip.shuffle=window",
    "clip.window_segments=2",
    "clip.stride_seconds=0.5",
    "data.segment_seconds=1",
    "run.checkpoint_seconds=0.001",
    "run.keep_checkpoints=9",
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 seconds with a key frame every second, and a cut."""
    path = tmp_path_factory.mktemp("film") / "walk.mp4"
    return make_video(
        path, width=160, height=96, num_frames=240, frames_per_second=24, seed=1, group_size=24, cuts=[130]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, film: Path, ray_cluster) -> Path:
    """A small run that ingested its own video meanwhile."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]")
    assert dora_ray.train(config, out=run).metrics["step"] == 6
    return run


def test_training_waits_for_no_more_than_its_windows(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ingest stops after the segments of the first window, and the first step is done all the same."""
    done, turns = threading.Event(), []
    plain = store_ingest.run_tasks

    def stops(items: Any, *arguments: Any, **options: Any) -> Any:
        if turns:  # of the first window: the next one waits
            assert done.wait(120)
        turns.append(len(items))
        yield from plain(items, *arguments, **options)

    monkeypatch.setattr(store_ingest, "run_tasks", stops)
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]", "optim.steps=1", "optim.warmup_steps=0")
    run = dora_ray.train(config, out=tmp_path / "run", on_metrics=lambda _: done.set())
    assert run.metrics["step"] == 1
    assert len(turns) == 2
    assert turns[0] <= 4
    assert sum(turns) == 10


def test_a_run_over_a_full_store_is_the_run_that_filled_it(finished: Path, film: Path, tmp_path: Path) -> None:
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]", f"data.store={finished.parent / 'store'}")
    dora_ray.train(config, out=tmp_path / "again")
    assert same(weights_of(tmp_path / "again"), weights_of(finished))
    assert read_history(str(tmp_path / "again")) == read_history(str(finished))


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


@pytest.mark.slow
def test_three_workers_that_do_not_divide_the_slots(finished: Path, film: Path, tmp_path: Path) -> None:
    """The bits are the same. They fill a store of their own meanwhile."""
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]", "cluster.num_workers=3")
    result = dora_ray.train(config, out=tmp_path / "run")
    assert result.metrics["world_size"] == 3
    assert same(weights_of(tmp_path / "run"), weights_of(finished))
    assert read_history(result.path) == read_history(str(finished))
    check_waits(read_metrics(result.path))


def check_waits(lines: list[dict[str, Any]]) -> None:
    """Every line says how long the slowest rank waited, and by Ray Data's stages for what."""
    stages = ("production_wait", "data_transfer", "batching", "format", "collate", "finalize")
    blocked = [sum(line[f"blocked_{stage}_seconds"] for stage in stages) for line in lines]
    exposed = [line["exposed_wait_seconds"] for line in lines]
    assert min(exposed) >= 0
    # The first line's stages begin with the stream, while the networks are still made.
    assert blocked[0] > 0
    assert sum(blocked[1:]) <= sum(exposed[1:]) + 0.05 * len(lines)


def test_an_ingest_that_fails_ends_the_run_with_its_reason(film: Path, tmp_path: Path, monkeypatch) -> None:
    def fails(items: Any, *_: Any, **__: Any) -> Any:
        raise VideoError("walk.mp4: the disk is gone")
        yield

    monkeypatch.setattr(store_ingest, "run_tasks", fails)
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]")
    with pytest.raises(VideoError, match=r"walk\.mp4: the disk is gone"):
        dora_ray.train(config, out=tmp_path / "run")


def test_a_store_whose_segments_never_come_ends_the_run(film: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store_ingest, "_commit_all", lambda written: written.clear())
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]")
    with pytest.raises(VideoError, match="the ingest has ended, and the store lacks frames of the next clips"):
        dora_ray.train(config, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("clip.window_segments=3", "clip.window_segments: 2 in the checkpoint, 3 now"),
        ("data.segment_seconds=2", "data.segment_seconds: 1.0 in the checkpoint, 2.0 now"),
        ("clip.shuffle=global", "clip.shuffle: window in the checkpoint, global now"),
    ],
)
def test_a_resume_with_other_windows_is_refused(finished: Path, film: Path, tmp_path: Path, override, words) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    store = f"data.store={finished.parent / 'store'}"
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]", store, override)
    with pytest.raises(CheckpointError) as caught:
        dora_ray.train(config, out=run, resume=True)
    assert words in str(caught.value)


def test_the_ingest_takes_segments_in_the_order_of_the_windows(film: Path, tmp_path: Path) -> None:
    config = dora_ray.load_config("tiny", *WINDOW, f"data.videos=[{film}]")
    found = inputs.make_inputs(config, str(tmp_path), None)
    plan, (video,) = found.plan, inputs.plan_order(found.plan.videos)
    first = plan.windows(0)[0]
    needed = {f for unit in first.units for f in range(plan.unit_frames(unit)[1], plan.unit_frames(unit)[2] + 1)}
    ready: set[int] = set()
    for part in found.work[:4]:
        ready |= {int(frame) for frame in range(len(video.pts)) if int(video.pts[frame]) in set(part.pts)}
    assert needed <= ready
    assert sorted(part.segment for part in found.work) == list(range(10))
    ordered, awaited = in_order_of_need(list(reversed(found.work)), plan, [video])
    assert ordered[0].segment in {p.segment for p in found.work[:2]}
    assert awaited == found.awaited
    pts_needed = {int(video.pts[frame]) for frame in needed}
    assert [bool(pts_needed & set(part.pts)) for part in found.work] == [i < awaited for i in range(10)]


def test_a_training_with_nothing_to_ingest_asks_nothing_of_ray(
    finished: Path, film: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(ingest_beside, "tasks_beside", lambda config, reading: pytest.fail("the cluster was looked at"))
    monkeypatch.setattr(ingest_beside, "ray_cluster", lambda: pytest.fail("Ray was started"))
    store = f"data.store={finished.parent / 'store'}"
    config = dora_ray.load_config(
        "tiny", *WINDOW, f"data.videos=[{film}]", store, "optim.steps=1", "optim.warmup_steps=0"
    )
    assert dora_ray.train(config, out=tmp_path / "run").metrics["step"] == 1
