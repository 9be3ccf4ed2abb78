"""What a sweep's figures stand beside: random encoders of a trial's architecture."""

from __future__ import annotations

import pytest

from dora_ray.config import load_config
from dora_ray.training.launch import train
from dora_ray.tuning.baseline import RANDOM_SEEDS, measure_baseline, read_baseline
from dora_ray.video.synthetic import make_photo_classes


@pytest.mark.slow
def test_random_encoders_are_measured_once_as_the_trials_were(small, tmp_path):
    pytest.importorskip("skimage")
    images = tmp_path / "images"
    make_photo_classes(str(images), seed=0)
    config = load_config("tiny", *small, "optim.steps=2", f"evaluation.images={images}", "evaluation.max_images=40")
    run = train(config, out=tmp_path / "run")
    assert read_baseline(str(tmp_path)) == {}
    measure_baseline(str(tmp_path), run.path, config)
    facts = read_baseline(str(tmp_path))["knn"]
    assert (facts["images"], facts["chance"]) == (40, 0.1)
    assert len(facts["random"]) == len(RANDOM_SEEDS)
    assert all(0 <= share <= 1 for share in facts["random"])
    (tmp_path / "baseline.json").write_text("{}")
    measure_baseline(str(tmp_path), run.path, config)
    assert read_baseline(str(tmp_path)) == {}, "it is not measured again"
