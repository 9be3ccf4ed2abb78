"""Whole sweeps of tiny trainings: what they leave, how a failure is kept, what a resume runs again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_ray.errors import CheckpointError, ConfigError, VideoError
from dora_ray.training.records.journal import read_status
from dora_ray.tuning.capacity import Need, largest
from dora_ray.tuning.data import distinct_data, place, with_absolute_values
from dora_ray.tuning.driver import trainable
from dora_ray.tuning.results import read_csv
from dora_ray.tuning.space import base_config, expand, load_sweep, make_trial
from dora_ray.tuning.sweep import _cluster, sweep


@pytest.fixture
def objects(small):
    """Two points, of which the second diverges: its learning rate is beyond float32."""
    return {
        "question": "How fast may it learn?",
        "base": "tiny",
        "overrides": list(small),
        "space": {"optim.lr": {"grid": [1.0e-3, 1.0e30]}},
        "seeds": [0],
        "max_concurrent_trials": 1,
    }


def _times(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("trials/*/metrics.jsonl")}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_trial_is_kept_and_the_others_finish(objects, tmp_path):
    ends = {}
    folder = tmp_path / "sweep"
    result = sweep(objects, out=folder, on_progress=lambda progress: ends.update(progress.ended))
    good, bad = result.results
    assert (good.status, bad.status) == ("done", "failed")
    assert "DivergenceError" in bad.error
    assert [row.name for row in result.best] == [good.name]
    assert ends == {good.name: "done", bad.name: "failed"}
    assert read_status(str(folder))["state"] == "failed", "a sweep with a failed trial is not done"
    _check_books(folder, objects, {1.0e-3: None, 1.0e30: "DivergenceError"})
    assert read_csv(str(folder / "results.csv")) == result.results
    assert 0 < good.metrics["loss"] < 10
    assert (folder / good.path / "checkpoints" / "latest").is_file()
    page = (folder / "report.html").read_text()
    assert good.name in page
    assert 'class="badge failed"' in page, "the page that stays shows how the sweep ended"
    assert load_sweep(folder / "sweep.yaml") == load_sweep(objects)

    before = _times(folder)
    with pytest.raises(
        ConfigError,
        match=r"already holds the sweep 'How fast may it learn\?' \(1 of 2 trials done\)\. Continue with --resume",
    ):
        sweep(objects, out=folder)
    with pytest.raises(ConfigError, match="holds another sweep"):
        sweep(objects, "optim.steps=7", out=folder, resume=True)
    again = sweep(objects, "seeds=[0,1]", out=folder, resume=True)
    assert sorted(row.status for row in again.results) == ["done", "done", "failed", "failed"]
    assert _times(folder)[good.name] == before[good.name], "what is done is not run again"
    assert _times(folder)[bad.name] > before[bad.name], "what failed is tried again"
    assert [row for row in again.results if row.name == good.name] == [good]
    _check_books(folder, objects, {1.0e-3: None, 1.0e30: "DivergenceError"}, seeds=2)
    with pytest.raises(ConfigError, match=r"leaves out \[1\]"):
        sweep(objects, out=folder, resume=True)


def _check_books(folder: Path, spec: dict, errors: dict, seeds: int = 1) -> None:
    """Ray Tune's own folder says what was varied, and what came of it, of all trials."""
    from ray import tune

    analysis = tune.ExperimentAnalysis(str(folder / "tune"), default_metric="loss", default_mode="min")
    assert analysis.get_best_config() in [{"optim.lr": 1.0e-3, "run.seed": seed} for seed in range(seeds)]
    table = analysis.dataframe()
    assert len(table) == len(errors) * seeds
    assert set(table["config/optim.lr"]) == set(errors)
    done = table[table["config/optim.lr"] == 1.0e-3]
    assert list(done["step"]) == [6] * seeds
    assert list(done["training_iteration"]) == [6] * seeds, "every line of metrics is a report"
    for result in tune.Tuner.restore(str(folder / "tune"), trainable=trainable(str(folder))).get_results():
        expected = errors[result.config["optim.lr"]]
        assert (expected is None) == (result.error is None)
        assert expected is None or expected in str(result.error)
    boards = b"".join(path.read_bytes() for path in folder.glob("tune/*/events.out.tfevents.*"))
    assert b"optim.lr" in boards, "TensorBoard's HParams show what was varied"


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


def test_given_weights_that_are_missing_stop_a_sweep_before_it_begins(small, tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.pth: there is no such file"):
        sweep({"overrides": list(small), "space": {"model.init": [f"{tmp_path}/a.pth"]}}, out=tmp_path / "sweep")
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
    base = place(base_config(spec), spec, "/sweeps/a")
    assert base.data.store == "/sweeps/a/store"
    assert base.evaluation.images == "/sweeps/a/images"
    assert len(distinct_data([make_trial(base, trial.values).config for trial in expand(spec)])) == 2
    named = load_sweep(
        {"space": {"tracking.num_objects": [1]}, "photographs": True}, "data.store=/s", "evaluation.images=/i"
    )
    base = place(base_config(named), named, "/sweeps/a")
    assert (base.data.store, base.evaluation.images) == ("/s", "/i")
    with pytest.raises(ConfigError, match="photographs cannot be written to s3://bucket/a"):
        place(base_config(spec), spec, "s3://bucket/a")


def test_paths_of_trials_begin_in_the_commands_folder(small, tmp_path, monkeypatch):
    """Ray Tune has each trial work in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    spec = with_absolute_values(
        load_sweep(
            {
                "overrides": [*small, "data.videos=[films/*.mp4]", "evaluation.images=labeled"],
                "space": {"model.init": ["a.pth", "timm:vit_x"], "optim.lr": [1.0e-3]},
            }
        )
    )
    base = place(base_config(spec), spec, str(tmp_path / "sweep"))
    monkeypatch.chdir("/")
    configs = [make_trial(base, trial.values).config for trial in expand(spec)]
    assert [config.model.init for config in configs] == [f"{tmp_path}/a.pth", "timm:vit_x"]
    assert {config.data.videos for config in configs} == {(f"{tmp_path}/films/*.mp4",)}
    assert {config.evaluation.images for config in configs} == {f"{tmp_path}/labeled"}


def test_a_cluster_started_here_has_room_for_a_trial_and_its_driver():
    spec = load_sweep(
        {"space": {"tracking.num_objects": [1, 2]}}, "cluster.num_workers=2", "cluster.decode_cpus=1", "optim.slots=4"
    )
    trials = expand(spec)
    need = largest([trial.config for trial in trials])
    assert Need.of(trials[0].config).cpus == need.cpus == pytest.approx(0.1 + 2 * 1 + 1)
    cluster = _cluster(trials)
    assert cluster.max_workers * cluster.cluster.cpus_per_worker + cluster.cluster.decode_cpus == pytest.approx(3.1)


def test_an_override_of_a_swept_key_is_refused(small, tmp_path):
    spec = {"overrides": list(small), "space": {"tracking.num_objects": [1, 2]}}
    with pytest.raises(ConfigError, match=r"tracking\.num_objects=3 sets a key that this sweep varies"):
        sweep(spec, "tracking.num_objects=3", out=tmp_path / "sweep")
    with pytest.raises(ConfigError, match=r"set seeds with seeds="):
        sweep(spec, "run.seed=3", out=tmp_path / "sweep")


def test_a_resume_needs_a_folder_and_says_when_there_is_nothing_to_resume(small, tmp_path, caplog):
    spec = {"overrides": list(small), "space": {"tracking.num_objects": [1, 99]}}
    with pytest.raises(ConfigError, match="name it with --out"):
        sweep(spec, resume=True)
    with pytest.raises(ConfigError, match="num_objects=99"):
        sweep(spec, out=tmp_path / "sweep", resume=True)
    assert "holds no sweep yet" in caplog.text


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_optuna_proposes_points_for_all_seeds_and_goes_on_from_those_it_has(small, tmp_path):
    pytest.importorskip("optuna")
    spec = {
        "overrides": [*small, "optim.steps=2", "optim.warmup_steps=1"],
        "space": {"optim.lr": {"loguniform": [1.0e-4, 1.0e-2]}, "tracking.num_objects": {"grid": [1, 3]}},
        "num_samples": 1,
        "seeds": [0, 1],
        "max_concurrent_trials": 1,
        "search": "tpe",
    }
    first = sweep(spec, out=tmp_path / "sweep")
    assert [row.status for row in first.results] == ["done"] * 2
    points = {row.point for row in first.results}
    assert len(points) == 1
    before = _times(tmp_path / "sweep")
    grown = sweep(spec, "num_samples=2", out=tmp_path / "sweep", resume=True)
    assert len(grown.results) == 4
    assert points < {row.point for row in grown.results}, "Optuna goes on from the points that it has"
    assert {name: _times(tmp_path / "sweep")[name] for name in before} == before
