"""Evaluations that are kept with the run."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from dora_ray import evaluate, export
from dora_ray.evaluation.kept import EVALUATIONS, read_evaluations, run_of
from tests.evaluation.checkpoints import small_config, write_checkpoint
from tests.evaluation.test_evaluate import images  # noqa: F401  the fixture


@pytest.fixture
def run(tmp_path):
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000007", small_config())
    (tmp_path / "run" / "config.yaml").write_text("{}")
    return tmp_path / "run"


def test_an_evaluation_of_a_runs_checkpoint_is_kept_with_the_run(run, images):  # noqa: F811
    results = [evaluate(run, "knn", data=images, neighbors=[3]), evaluate(run, "linear", data=images, epochs=2)]
    kept = read_evaluations(str(run))
    assert [{name: line[name] for name in line if name != "time"} for line in kept] == results
    assert [line["task"] for line in kept] == ["knn", "linear"]
    assert kept[0]["checkpoint"] == str(run / "checkpoints" / "step-00000007")
    assert kept[0]["settings"]["neighbors"] == [3]
    assert datetime.fromisoformat(kept[0]["time"]).utcoffset().total_seconds() == 0


def test_a_line_that_was_cut_off_is_left_out(run, images):  # noqa: F811
    evaluate(run, "knn", data=images)
    with (run / EVALUATIONS).open("a") as file:
        file.write('{"time": "2026-')
    evaluate(run, "linear", data=images, epochs=1)
    assert [line["task"] for line in read_evaluations(str(run))] == ["knn", "linear"]


def test_exports_and_loose_checkpoints_have_no_run(run, images, tmp_path):  # noqa: F811
    folder = export(run, tmp_path / "export")
    evaluate(folder, "knn", data=images)
    assert not (folder / EVALUATIONS).exists()
    loose = write_checkpoint(tmp_path / "elsewhere" / "step-00000007", small_config())
    assert run_of(str(loose)) is None
    assert run_of(str(run / "checkpoints" / "step-00000007")) == str(run)
    assert run_of("s3://bucket/export") is None
    assert run_of("timm:vit_tiny_patch16_224") is None
    assert read_evaluations(str(tmp_path)) == []


def test_a_run_that_cannot_be_written_gives_its_score_all_the_same(run, images, caplog):  # noqa: F811
    (run / EVALUATIONS).mkdir()
    with caplog.at_level("WARNING"):
        assert json.dumps(evaluate(run, "knn", data=images)["results"])
    assert "was not saved" in caplog.text
