"""The verdict: that it claims no more than seeds and test images carry."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dora_ray.reporting.analysis import analyze, caution, other_verdicts, verdict
from dora_ray.reporting.importance import importances
from dora_ray.reporting.points import describe_references, draw_points
from dora_ray.tuning.results import Row, read_csv, read_spec
from dora_ray.tuning.space import expand, load_sweep
from tests.tuning.folders import write_sweep


def _analyze(folder, baseline=None):
    return analyze(read_csv(str(folder / "results.csv")), read_spec(str(folder)), baseline)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([[0.20, 0.21, 0.2], [0.40, 0.41, 0.4]], "better than the other, num_objects 1, by 20.0 ± 0.0 points"),
        ([[0.2, 0.31], [0.3, 0.32]], "not separable from the other (num_objects 1). No difference is shown"),
        ([[0.2], [0.3]], "with one seed each: this cannot tell"),
        ([[None, None], [0.3, 0.3]], "the only point that finished"),
        ([[None, None], [None, None]], "No trial has finished with a knn yet"),
    ],
)
def test_the_verdict_claims_no_more_than_the_seeds_carry(tmp_path, values, says):
    sentence = verdict(_analyze(write_sweep(tmp_path / "sweep", values)))
    assert says in sentence
    if "yet" not in says:
        assert "num_objects 2" in sentence or "the only point" in sentence


def test_the_verdict_stands_beside_random_encoders_and_says_its_images(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [[0.20, 0.21, 0.2], [0.40, 0.41, 0.4]])
    facts = {"knn": {"random": [0.14, 0.15], "chance": 0.1, "images": 400}}
    sentence = verdict(_analyze(folder, facts))
    assert "± 4.8 over 400 test images" in sentence
    assert "It is beyond 2 random encoders (14.0 % to 15.0 %); chance is 10.0 %." in sentence
    worse = {"knn": {"random": [0.5], "chance": 0.1}}
    assert "It is worse than 1 random encoders (50.0 %)" in verdict(_analyze(folder, worse))


def test_a_figure_that_depends_on_the_setting_stands_beside_random_encoders_of_that_setting(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [[0.20, 0.21, 0.2], [0.40, 0.41, 0.4]])
    points = [{"values": {"tracking.num_objects": count}, "random": [0.2 * count, 0.21 * count]} for count in (1, 2)]
    found = _analyze(folder, {"knn": {"points": points}})
    assert [beside.random for beside in found.references.values()] == [(0.2, 0.21), (0.4, 0.42)]
    assert found.shared.random == ()
    assert "It is not clearly beyond 2 random encoders with its settings (40.0 % to 42.0 %)." in verdict(found)
    drawn = draw_points(found, title="kNN")
    assert drawn.count('class="ring"') == 3, "one a point, and the legend's"
    assert "num_objects 1: random encoder 20.5" in drawn
    assert 'class="reference"' not in drawn
    assert "Rings: the mean of 2 random encoders" in describe_references(found)


def test_chance_that_each_point_has_of_its_own_is_not_averaged(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [[0.20, 0.21, 0.2], [0.40, 0.41, 0.4]])
    rows = [
        replace(row, metrics=row.metrics | {"knn_random_masks": 0.05 * row.values["tracking.num_objects"]})
        for row in read_csv(str(folder / "results.csv"))
    ]
    found = analyze(rows, read_spec(str(folder)))
    assert "Chance is 10.0 %." in verdict(found)
    assert draw_points(found, title="kNN").count('class="tick"') == 3


def test_less_is_better_where_the_sweep_says_so(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [[1.0, 1.001], [3.0, 3.001]], metric="loss", mode="min")
    found = _analyze(folder)
    assert verdict(found).startswith("num_objects 1: loss 1 ±")
    assert "better than the other" in verdict(found)
    assert "not a better encoder" in caution(found.spec)


def _crossed(seeds, per_object=0.05, noise=0.0):
    spec = load_sweep(
        {
            "space": {"tracking.num_objects": [1, 2, 3, 4], "tracking.num_iterations": [0, 30]},
            "seeds": list(range(seeds)),
            "metric": "knn",
            "mode": "max",
        }
    )
    rng = random.Random(0)
    figures = {
        trial.name: 0.2 + per_object * trial.values["tracking.num_objects"] + noise * rng.gauss(0, 1)
        for trial in expand(spec)
    }
    rows = [Row(trial.name, trial.values, "done", {"knn": figures[trial.name]}) for trial in expand(spec)]
    return analyze(rows, spec)


@pytest.mark.parametrize("seeds", [2, 3])
def test_what_moves_the_metric_is_important(seeds):
    if seeds == 3:
        pytest.importorskip("optuna")
    shares, how = importances(_crossed(seeds))
    assert shares["tracking.num_objects"] > 0.9
    assert ("PED-ANOVA" in how) == (seeds == 3)
    assert "The effect of tracking.num_iterations is not told apart from none" in how


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("seeds", [2, 6])
def test_noise_is_not_shared_out_among_the_factors(seeds, noise):
    shares, how = importances(_crossed(seeds, per_object=0.0, noise=noise))
    assert shares == {}
    assert "No factor is told apart" in how


def test_an_effect_over_points_that_are_not_told_apart_is_not_denied():
    found = _crossed(4, per_object=0.006, noise=0.01)
    assert list(found.comparison.points)[-1] in found.comparison.tied, "or the case shows nothing"
    shares, how = importances(found)
    assert shares == {}
    assert "an effect whose interval leaves out 0" in how


def test_values_that_were_tried_more_often_are_not_important_for_that():
    whole = _crossed(6, noise=0.01)
    worst = [row for row in whole.rows if row.values["tracking.num_objects"] > 1 or not row.values["run.seed"]]
    for rows in (worst, [row for row in whole.rows if row.values["tracking.num_iterations"] or row in worst]):
        shares, how = importances(analyze(rows, whole.spec))
        assert "PED-ANOVA" not in how
        assert shares["tracking.num_objects"] > 0.8


def test_one_seed_a_point_has_the_effects_errors():
    shares, _ = importances(_crossed(1, noise=0.01))
    assert shares["tracking.num_objects"] > 0.9
    shares, how = importances(_crossed(1, per_object=0.0, noise=0.02))
    assert shares == {}
    assert "No factor is told apart" in how


def test_other_measures_answer_too(tmp_path):
    folder = write_sweep(tmp_path / "sweep", [[0.20, 0.21, 0.2], [0.40, 0.41, 0.4]])
    rows = [replace(row, metrics=row.metrics | {"object_iou": 0.3}) for row in read_csv(str(folder / "results.csv"))]
    ((metric, text),) = other_verdicts(rows, read_spec(str(folder)), {})
    assert metric == "object_iou"
    assert "object_iou 30.0 %" in text
    assert "not separable from the other" in text
