"""What a sweep's figures stand beside: random encoders with the settings of its points."""

from __future__ import annotations

import json

import pytest

from dora_ray.config import load_config
from dora_ray.training.launch import train
from dora_ray.training.measuring import OBJECTS, PROPAGATION, VIEWS
from dora_ray.tuning import baseline
from dora_ray.tuning.baseline import RANDOM_SEEDS, measure_baseline, read_baseline
from dora_ray.tuning.space import Trial, expand, load_sweep, make_trial
from dora_ray.video.synthetic import make_photo_classes


@pytest.mark.slow
def test_random_encoders_are_measured_once_as_the_trials_were(small, tmp_path):
    pytest.importorskip("skimage")
    images = tmp_path / "images"
    make_photo_classes(str(images), seed=0)
    config = load_config("tiny", *small, "optim.steps=2", f"evaluation.images={images}", "evaluation.max_images=40")
    train(config, out=tmp_path / "trials" / "only")
    trial = Trial(name="only", values={"run.seed": 0}, config=config)
    assert read_baseline(str(tmp_path)) == {}
    measure_baseline(str(tmp_path), [trial])
    facts = read_baseline(str(tmp_path))["knn"]
    assert (facts["images"], facts["chance"]) == (40, 0.1)
    assert len(facts["random"]) == len(RANDOM_SEEDS)
    assert all(0 <= share <= 1 for share in facts["random"])
    facts["random"] = [0.5]
    (tmp_path / "baseline.json").write_text(json.dumps({"knn": facts}))
    measure_baseline(str(tmp_path), [trial])
    assert read_baseline(str(tmp_path)) == {"knn": facts}, "it is not measured again"


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, tuple[str, ...]]]:
    """What is measured: number of objects, and tasks. An object IoU is that number, all other figures are 7."""
    found: list[tuple[int, tuple[str, ...]]] = []

    def measure(backbone, config, *, device, tasks):
        count = config.tracking.num_objects
        found.append((count, tuple(tasks)))
        return ({"object_iou": float(count)} if OBJECTS in tasks else {"j_and_f": 7.0, "rankme": 7.0}), []

    monkeypatch.setattr(baseline, "measure_teacher", measure)
    monkeypatch.setattr(baseline, "random_backbone", lambda checkpoint, *, seed: None)
    monkeypatch.setattr(baseline, "resolve_checkpoint", lambda run: run)
    return found


def _trials(space: dict[str, list[int | float]], *keys: str) -> list[Trial]:
    spec = load_sweep({"space": space, "seeds": [0, 1], "metric": "j_and_f", "mode": "max"})
    base = load_config("tiny", "evaluation.tour=/films/tour", "evaluation.video=/films/other", *keys)
    return [make_trial(base, trial.values) for trial in expand(spec)]


OTHERS = (PROPAGATION, VIEWS)


def test_masks_are_measured_at_each_setting_and_encoders_once(asked, tmp_path):
    measure_baseline(str(tmp_path), _trials({"tracking.num_objects": [1, 3], "loss.teacher_temperature": [0.02, 0.08]}))
    assert asked == 6 * [(1, OTHERS)] + 6 * [(1, (OBJECTS,))] + 6 * [(3, (OBJECTS,))]
    facts = read_baseline(str(tmp_path))
    assert facts["j_and_f"] == {"random": 6 * [7.0]}
    found = {(p["values"]["tracking.num_objects"], p["values"]["loss.teacher_temperature"]): p["random"] for p in
             facts["object_iou"]["points"]}  # fmt: skip
    assert found == {(count, heat): 6 * [float(count)] for count in (1, 3) for heat in (0.02, 0.08)}


def test_what_no_trial_was_measured_by_is_not_measured(asked, tmp_path):
    measure_baseline(str(tmp_path), _trials({"tracking.num_objects": [1, 3]}, "evaluation.tour=null"))
    assert asked == 6 * [(1, (VIEWS,))]


def test_a_grown_sweep_measures_what_is_new(asked, tmp_path):
    measure_baseline(str(tmp_path), _trials({"tracking.num_objects": [1]}))
    assert read_baseline(str(tmp_path))["object_iou"] == {"random": 6 * [1.0]}
    for _ in range(2):
        asked.clear()
        measure_baseline(str(tmp_path), _trials({"tracking.num_objects": [1, 2]}))
        facts = read_baseline(str(tmp_path))
        assert [(p["values"], p["random"][0]) for p in facts["object_iou"]["points"]] == [
            ({"tracking.num_objects": 1}, 1.0),
            ({"tracking.num_objects": 2}, 2.0),
        ]
        assert "random" not in facts["object_iou"], "what held for all does no longer"
    assert asked == [], "nothing is new"


def test_encoders_of_several_architectures_are_measured_each(asked, tmp_path):
    measure_baseline(str(tmp_path), _trials({"model.depth": [2, 3]}))
    assert len(asked) == 4 * len(RANDOM_SEEDS)
    assert [p["values"] for p in read_baseline(str(tmp_path))["j_and_f"]["points"]] == [
        {"model.depth": 2},
        {"model.depth": 3},
    ]


def test_what_depends_on_no_setting_of_masks_holds_for_all(asked, tmp_path):
    measure_baseline(str(tmp_path), _trials({"loss.teacher_temperature": [0.02, 0.08]}))
    assert read_baseline(str(tmp_path))["object_iou"] == {
        "random": 6 * [float(load_config("tiny").tracking.num_objects)]
    }
