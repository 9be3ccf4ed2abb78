"""What a run measures of its teacher beside the training."""

from __future__ import annotations

from pathlib import Path

import pytest

import dora_ray
from dora_ray.errors import ConfigError, VideoError
from dora_ray.training.measuring import is_due, measure_teacher, prepare
from dora_ray.training.records.journal import read_metrics
from dora_ray.video.tour_files import make_tour
from tests.video.test_tours import flat_photographs

MEASURES = {
    "j_and_f",
    "object_iou",
    "tracking_iou",
    "view_matching",
    "view_matching_later",
    "view_matching_local",
    "rankme",
}


@pytest.fixture(scope="module")
def tour(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tour")
    settings = {"width": 64, "height": 48, "frames_per_second": 6.0, "seed": 0, "sequence_seconds": 4.0}
    make_tour(out, num_frames=120, photographs=flat_photographs(), **settings)
    return out


def test_it_is_due_at_the_end_and_every_so_many_steps():
    config = dora_ray.load_config("tiny", "evaluation.video=v.mp4", "evaluation.every_steps=30")
    assert [step for step in range(1, 401) if is_due(config, step)] == [*range(30, 391, 30), 400]
    at_the_end = dora_ray.load_config("tiny", "evaluation.tour=t")
    assert [step for step in range(1, 401) if is_due(at_the_end, step)] == [400]
    assert not is_due(dora_ray.load_config("tiny", "evaluation.every_steps=1"), 400)


def test_a_run_reports_all_measures(tmp_path: Path, small: tuple[str, ...], tour: Path) -> None:
    keys = (f"evaluation.tour={tour}", f"evaluation.video={tour}", "evaluation.every_steps=2", "evaluation.max_clips=6")
    config = dora_ray.load_config("tiny", *small, "optim.steps=4", *keys)
    run = dora_ray.train(config, out=tmp_path / "run")
    lines = read_metrics(str(run.path))
    assert [line["step"] for line in lines if "object_iou" in line] == [2, 4]
    assert set(run.metrics) >= MEASURES
    assert all(0 <= run.metrics[name] <= 1 for name in MEASURES - {"rankme"})
    # The same numbers from the checkpoint, by the command's way.
    again = dora_ray.evaluate(run.path, "objects", data=tour, max_clips=6, random_encoders=0)["results"]
    assert again["object_iou"] == pytest.approx(run.metrics["object_iou"], abs=1e-6)
    views = dora_ray.evaluate(run.path, "views", data=tour, num_scenes=6, random_encoders=0)["results"]
    assert views["view_matching"] == pytest.approx(run.metrics["view_matching"])


def test_measuring_does_not_change_the_training(tmp_path: Path, small: tuple[str, ...], tour: Path) -> None:
    plain = dora_ray.train(dora_ray.load_config("tiny", *small), out=tmp_path / "plain")
    keys = (f"evaluation.tour={tour}", f"evaluation.video={tour}", "evaluation.every_steps=1")
    measured = dora_ray.train(dora_ray.load_config("tiny", *small, *keys), out=tmp_path / "measured")
    assert measured.metrics["loss"] == plain.metrics["loss"]


def test_data_is_looked_for_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no labeled clips"):
        prepare(dora_ray.load_config("tiny", f"evaluation.tour={tmp_path}"))
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        prepare(dora_ray.load_config("tiny", f"evaluation.video={tmp_path / 'gone.mp4'}"))


def test_paths_become_absolute(tour: Path, monkeypatch) -> None:
    monkeypatch.chdir(tour.parent)
    found = prepare(dora_ray.load_config("tiny", f"evaluation.tour={tour.name}", f"evaluation.video={tour.name}"))
    assert found.evaluation.tour == str(tour)
    assert found.evaluation.video == str(tour / "film.mp4")


def test_data_that_vanishes_is_told_and_ends_nothing(tmp_path: Path) -> None:
    from tests.evaluation.test_objects import small_vit

    keys = (f"evaluation.tour={tmp_path}", f"evaluation.video={tmp_path / 'gone.mp4'}")
    values, problems = measure_teacher(small_vit(), dora_ray.load_config("tiny", *keys), device="cpu")
    assert values == {}
    assert [problem.partition(":")[0] for problem in problems] == [
        "no objects",
        "no label propagation",
        "no view matching",
    ]
