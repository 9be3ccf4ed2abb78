"""Whole sweeps of tiny trainings: what they leave, how a failure is kept, what a resume runs again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_ray.errors import ConfigError, VideoError
from dora_ray.tuning.results import read_csv
from dora_ray.tuning.space import expand, load_sweep
from dora_ray.tuning.sweep import _cpus, _distinct_data, _largest, _place, sweep


@pytest.fixture
def objects(small):
    """Two points, of which the second diverges: its learning rate is beyond float32."""
    return {
        "question": "How fast may it learn?",
        "base": "tiny",
        "overrides": list(small),
        "space": {"optim.lr": {"grid": [1.0e-3, 1.0e30]}},
        "seeds": [0],
    }


def _times(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("trials/*/metrics.jsonl")}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_trial_is_kept_and_the_others_finish(objects, tmp_path):
    ends = []
    folder = tmp_path / "sweep"
    result = sweep(objects, out=folder, on_trial=lambda name, status: ends.append((name, status)))
    good, bad = result.results
    assert (good.status, bad.status) == ("done", "failed")
    assert "DivergenceError" in bad.error
    assert [row.name for row in result.best] == [good.name]
    assert sorted(ends) == sorted([(good.name, "done"), (bad.name, "failed")])
    assert read_csv(str(folder / "results.csv")) == result.results
    assert 0 < good.metrics["loss"] < 10
    assert (folder / good.path / "checkpoints" / "latest").is_file()
    assert good.name in (folder / "report.html").read_text()
    assert load_sweep(folder / "sweep.yaml") == load_sweep(objects)

    before = _times(folder)
    with pytest.raises(ConfigError, match="is in use"):
        sweep(objects, out=folder)
    with pytest.raises(ConfigError, match="holds another sweep"):
        sweep(objects, "optim.steps=7", out=folder, resume=True)
    again = sweep(objects, out=folder, resume=True)
    assert [row.status for row in again.results] == ["done", "failed"]
    assert _times(folder)[good.name] == before[good.name], "what is done is not run again"
    assert _times(folder)[bad.name] > before[bad.name], "what failed is tried again"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_trials_with_workers_of_their_own_share_a_cluster(small, tmp_path):
    spec = {"overrides": list(small), "space": {"tracking.num_objects": [1, 2]}, "scheduler": "asha"}
    result = sweep(spec, "cluster.num_workers=1", "data.store=null", out=tmp_path / "sweep")
    statuses = [row.status for row in result.results]
    assert set(statuses) <= {"done", "stopped"}, [row.error for row in result.results]
    assert "done" in statuses
    assert (tmp_path / "sweep" / "store").is_dir()


def test_nothing_is_written_when_a_point_or_a_video_is_bad(small, tmp_path):
    space = {"tracking.num_objects": [1, 99]}
    with pytest.raises(ConfigError, match="num_objects=99"):
        sweep({"overrides": list(small), "space": space}, out=tmp_path / "sweep")
    with pytest.raises(VideoError, match=r"missing\.mp4"):
        sweep(
            {"overrides": list(small), "space": {"tracking.num_objects": [1]}},
            "data.videos=[missing.mp4]",
            out=tmp_path / "sweep",
        )
    assert not (tmp_path / "sweep").exists()


def test_another_folder_is_not_taken_for_a_sweep(small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not a sweep"):
        sweep({"overrides": list(small), "space": {"tracking.num_objects": [1]}}, out=tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_trials_share_a_store_and_photographs_unless_the_configuration_names_others():
    spec = load_sweep(
        {"space": {"tracking.num_objects": [1, 2], "clip.stride_seconds": [0.5, 1.0]}, "photographs": True}
    )
    trials = [_place(trial, spec, "/sweeps/a") for trial in expand(spec)]
    assert {trial.config.data.store for trial in trials} == {"/sweeps/a/store"}
    assert {trial.config.evaluation.images for trial in trials} == {"/sweeps/a/images"}
    assert len(_distinct_data([trial.config for trial in trials])) == 2
    named = load_sweep(
        {"space": {"tracking.num_objects": [1]}, "photographs": True}, "data.store=/s", "evaluation.images=/i"
    )
    (trial,) = (_place(trial, named, "/sweeps/a") for trial in expand(named))
    assert (trial.config.data.store, trial.config.evaluation.images) == ("/s", "/i")
    with pytest.raises(ConfigError, match="photographs cannot be written to s3://bucket/a"):
        _place(expand(spec)[0], spec, "s3://bucket/a")


def test_a_cluster_started_here_has_room_for_a_trial_and_its_driver():
    spec = load_sweep(
        {"space": {"tracking.num_objects": [1, 2]}}, "cluster.num_workers=2", "cluster.decode_cpus=1", "optim.slots=4"
    )
    trials = expand(spec)
    largest = _largest(trials)
    assert _cpus(trials[0].config) == pytest.approx(0.1 + 2 * 1 + 1)
    assert largest.max_workers * largest.cluster.cpus_per_worker + largest.cluster.decode_cpus == pytest.approx(3.1)
