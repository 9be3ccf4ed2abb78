"""A trial's final figures, its status, and results.csv."""

from __future__ import annotations

import json
from statistics import fmean

import pyarrow.parquet
import pytest

from dora_ray.training.records.journal import read_metrics
from dora_ray.tuning.results import (
    Row,
    best_point,
    collect,
    error_file,
    final_metrics,
    read_csv,
    stopped_file,
    trial_folder,
    trial_status,
    write_csv,
    write_parquet,
    write_spec,
)
from dora_ray.tuning.space import expand, load_sweep
from tests.tuning.folders import write_run


def test_final_figures_are_means_over_the_last_tenth():
    lines = [{"step": step, "time": 0.0, "attempt": 1, "loss": float(step)} for step in range(1, 101)]
    lines[39]["knn"], lines[79]["knn"] = 0.2, 0.3
    assert final_metrics(lines) == {"loss": fmean(range(91, 101)), "knn": 0.3}
    assert final_metrics(lines[:1]) == {"loss": 1.0}
    assert final_metrics([]) == {}


def test_a_figure_that_is_not_finite_is_left_out():
    lines = [{"step": step, "loss": float("nan") if step > 10 else 1.0} for step in range(1, 21)]
    assert final_metrics(lines) == {"loss": 1.0}


def test_the_table_reads_back_as_it_was_written(tmp_path):
    rows = [
        Row(
            "00_a",
            {"tracking.num_objects": 3, "crops.clip_scale": [0.2, 1.0], "run.seed": 0},
            "done",
            {"loss": 0.1 + 0.2},
            "trials/00_a",
        ),
        Row(
            "01_b",
            {"tracking.threshold": "soft", "run.seed": 1},
            "failed",
            {},
            "trials/01_b",
            'a "quoted", broken\u00fc error',
        ),
    ]
    write_csv(str(tmp_path / "results.csv"), rows)
    assert read_csv(str(tmp_path / "results.csv")) == rows


def test_a_spec_reads_back_as_it_was_understood(tmp_path):
    mapping = {
        "question": "Why?",
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "tracking.num_objects": [1, 2]},
        "num_samples": 2,
    }
    spec = load_sweep(mapping, "optim.steps=900", "seeds=[1,2]", "metric=knn", "mode=max")
    write_spec(str(tmp_path / "sweep.yaml"), spec)
    again = load_sweep(tmp_path / "sweep.yaml")
    assert again == spec
    assert expand(again) == expand(spec)


def _row(index, objects, seed, loss, status="done"):
    return Row(
        f"{index}", {"tracking.num_objects": objects, "run.seed": seed}, status, {} if loss is None else {"loss": loss}
    )


def test_the_best_point_has_the_best_mean_over_seeds():
    rows = [
        _row(0, 1, 0, 1.0),
        _row(1, 1, 1, 9.0),
        _row(2, 2, 0, 4.0),
        _row(3, 2, 1, 5.0),
        _row(4, 3, 0, 0.0, "failed"),
        _row(5, 3, 1, None),
    ]
    assert [row.name for row in best_point(rows, "loss", "min")] == ["2", "3"]
    assert [row.name for row in best_point(rows, "loss", "max")] == ["0", "1"]
    assert best_point(rows, "knn", "max") == []


def test_status_follows_from_what_the_folders_hold(tmp_path):
    sweep = str(tmp_path)
    trials = expand(load_sweep({"space": {"tracking.num_objects": [1, 2, 3, 4]}}))
    done, failed, stopped, missing = (trial.name for trial in trials)
    write_run(tmp_path / "trials" / done, steps=20, knn_every=20)
    for path, text in (
        (error_file(sweep, failed), "VideoError: gone\nTraceback ..."),
        (stopped_file(sweep, stopped), ""),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    assert [trial_status(sweep, name) for name in (done, failed, stopped, missing)] == [
        "done",
        "failed",
        "stopped",
        "missing",
    ]
    rows = collect(sweep, trials)
    assert [row.status for row in rows] == ["done", "failed", "stopped", "missing"]
    assert rows[0].metrics["knn"] == pytest.approx(0.3)
    assert rows[1].error == "VideoError: gone"
    assert rows[0].path == f"trials/{done}"


def test_a_run_that_was_cut_short_still_reads(tmp_path):
    run = write_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 1.0})[:9])
    assert [line["step"] for line in read_metrics(str(run))] == [1, 2, 3, 4, 5]
    assert trial_folder(str(tmp_path), "x").endswith("trials/x")


def test_the_cost_counts_every_step_and_every_worker():
    lines = [
        {"step": 10, "step_seconds": 0.5, "world_size": 2, "loss": 1.0},
        {"step": 30, "step_seconds": 1.0, "world_size": 1, "loss": 1.0},
    ]
    final = final_metrics(lines)
    assert (final["train_seconds"], final["worker_seconds"]) == (25.0, 30.0)


def test_the_parquet_table_keeps_numbers_and_mixed_columns(tmp_path):
    rows = [
        Row(
            "a_000001",
            {"optim.lr": 1, "tracking.threshold": "soft", "crops.clip_scale": [0.2, 1.0]},
            "done",
            {"knn": 0.5},
        ),
        Row("b_000002", {"optim.lr": 0.5, "tracking.threshold": 3}, "failed", {}, "trials/b", "no <disk>"),
    ]
    write_parquet(str(tmp_path / "results.parquet"), rows)
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pydict()
    assert table["name"] == ["a_000001", "b_000002"]
    assert table["optim.lr"] == [1.0, 0.5]
    assert table["tracking.threshold"] == ["soft", "3"]
    assert table["crops.clip_scale"] == ["[0.2, 1.0]", None]
    assert table["knn"] == [0.5, None]
    assert table["error"] == ["", "no <disk>"]
