"""What a sweep's file may say, and the trials that follow."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from dora_ray.errors import ConfigError
from dora_ray.tuning.axes import value_at
from dora_ray.tuning.space import expand, load_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


def test_a_grid_is_the_product_of_its_values_and_the_seeds():
    space = {"tracking.num_objects": {"grid": [1, 2, 3]}, "tracking.epsilon": [0.05, 0.1]}
    trials = expand(load_sweep({"base": "tiny", "space": space, "seeds": [0, 7]}))
    seen = [tuple(trial.values[key] for key in (*space, "run.seed")) for trial in trials]
    assert seen == list(product([1, 2, 3], [0.05, 0.1], [0, 7]))
    for trial in trials:
        assert trial.config.tracking.num_objects == trial.values["tracking.num_objects"]
        assert trial.config.tracking.epsilon == trial.values["tracking.epsilon"]
        assert trial.config.run.seed == trial.values["run.seed"]
    assert len({trial.name for trial in trials}) == len(trials)


def test_a_sweep_that_grows_keeps_the_names_of_its_trials():
    space = {"tracking.num_objects": [1, 3], "optim.lr": {"loguniform": [1.0e-4, 1.0e-2]}}
    few = expand(load_sweep({"space": space, "num_samples": 2}))
    grown = {**space, "tracking.num_objects": [2, 1, 3]}
    many = expand(load_sweep({"space": grown, "num_samples": 3, "seeds": [0, 1]}))
    named = {trial.name: trial for trial in many}
    assert len(named) == len(many) == 18
    assert all(named[trial.name] == trial for trial in few)
    assert all(trial.name.endswith(trial.short_id) and len(trial.short_id) == 6 for trial in many)


def test_keys_that_change_together_are_one_axis():
    axis = "tracking.kind + tracking.num_iterations"
    space = {axis: {"grid": [["dora", 30], ["dora", 0], ["none", 30]]}, "tracking.num_objects": [1, 3]}
    spec = load_sweep({"space": space})
    trials = expand(spec)
    assert spec.count == len(trials) == 6
    seen = [(trial.config.tracking.kind, trial.config.tracking.num_iterations) for trial in trials[::2]]
    assert seen == [("dora", 30), ("dora", 0), ("none", 30)]
    assert value_at(trials[0].values, axis) == "dora, 30"
    with pytest.raises(ConfigError, match=r"tracking\.kind=none sets a key that this sweep varies"):
        expand(load_sweep({"space": space}, "tracking.kind=none"))


def test_optuna_gets_every_value_checked_before_anything_starts():
    space = {"optim.lr": {"loguniform": [1.0e-4, 1.0e-2]}, "tracking.num_objects": {"grid": [1, 99]}}
    spec = load_sweep({"space": space, "search": "tpe", "num_samples": 5, "seeds": [0, 1]})
    assert spec.count == 10
    with pytest.raises(ConfigError, match="num_objects=99"):
        expand(spec)


def test_draws_repeat_and_are_the_same_for_every_grid_point():
    spec = load_sweep(
        {
            "space": {
                "optim.lr": {"loguniform": [1.0e-4, 1.0e-2]},
                "tracking.num_objects": {"grid": [1, 3]},
                "loss.teacher_temperature": {"uniform": [0.02, 0.08]},
                "tracking.threshold": {"choice": ["clip", "soft"]},
            },
            "num_samples": 20,
        }
    )
    trials = expand(spec)
    assert [trial.values for trial in trials] == [trial.values for trial in expand(spec)]
    rates = [trial.config.optim.lr for trial in trials]
    assert rates[0::2] == rates[1::2]
    assert len(set(rates)) == 20
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 4 < sum(rate < 1e-3 for rate in rates[::2]) < 16, "half of the draws should lie in each decade"
    assert all(0.02 <= trial.config.loss.teacher_temperature <= 0.08 for trial in trials)
    assert {trial.config.tracking.threshold for trial in trials} == {"clip", "soft"}


def test_overrides_reach_every_trial_and_the_sweep_itself():
    mapping = {"space": {"tracking.num_objects": [1, 2]}, "overrides": {"optim": {"steps": 170}}}
    spec = load_sweep(mapping, "optim.slots=1", "cluster.num_workers=1", "metric=knn", "mode=max", "seeds=[3]")
    assert (spec.metric, spec.mode, spec.seeds) == ("knn", "max", (3,))
    assert {(trial.config.optim.steps, trial.config.optim.slots) for trial in expand(spec)} == {(170, 1)}


GOOD = {"tracking.num_objects": {"grid": [1, 2]}}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "needs a `space`"),
        (
            {"space": {"tracking.num_object": [1]}},
            "unknown configuration key tracking.num_object. Did you mean tracking.num_objects?",
        ),
        ({"space": {"run.seed": [1, 2]}}, "list the seeds under `seeds`"),
        ({"space": {"optim.lr": {"normal": [0, 1]}}}, "loguniform: [low, high]"),
        ({"space": {"optim.lr": {"loguniform": [0.0, 1.0]}}}, "0 < low < high"),
        ({"space": {"optim.lr": {"uniform": ["1e-4", 1.0]}}}, "write 1.0e-3"),
        ({"space": {"optim.lr": {"grid": []}}}, "needs a list of values"),
        ({"space": GOOD, "num_samples": 3}, "would repeat the same points"),
        ({"space": GOOD, "search": "tpe", "scheduler": "asha"}, "search=tpe needs complete trials"),
        ({"space": {"crops.clip_scale": [[0.1, 1.0]]}, "search": "tpe"}, "does not support values that are lists"),
        ({"space": {"tracking.kind + optim.lr": [["dora", 1.0], "none"]}}, "each value is a list of 2, not 'none'"),
        ({"space": {"tracking.kind + optim.l": [["dora", 1.0]]}}, "optim.l"),
        ({"space": {"tracking.kind + run.seed": [["dora", 1]]}}, "list the seeds under `seeds`"),
        ({"space": GOOD, "sede": [1]}, "unknown key of a sweep file: sede."),
        ({"space": GOOD, "sedes": [1]}, "Did you mean seeds?"),
        ({"space": GOOD, "mode": "best"}, "mode='best'"),
        ({"space": GOOD, "seeds": []}, "seeds="),
        ({"space": GOOD, "overrides": 3}, "overrides=3"),
    ],
)
def test_a_bad_file_is_named(values, says):
    with pytest.raises(ConfigError) as error:
        load_sweep(values)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("space", "overrides", "says"),
    [
        ({"tracking.num_objects": [1, 2, 99]}, (), "num_objects=99"),
        ({"tracking.threshold": ["clip", "sharp"]}, (), "tracking.threshold='sharp'"),
        (GOOD, ("optim.lrr=1",), "Did you mean optim.lr?"),
        (GOOD, ("cluster.num_workers=[1,2]",), "fixed number"),
    ],
)
def test_every_point_is_checked_before_anything_starts(space, overrides, says):
    with pytest.raises(ConfigError) as error:
        expand(load_sweep({"space": space}, *overrides))
    assert says in str(error.value)


def test_a_missing_or_malformed_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no sweep file"):
        load_sweep(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("space:\n  tracking.num_objects: {grid: [1, 2\n")
    with pytest.raises(ConfigError, match="line 3, column 1"):
        load_sweep(broken)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_of_this_repository_are_runnable(path):
    spec = load_sweep(path)
    assert spec.question.endswith("?")
    assert len(expand(spec)) >= 4
    header = path.read_text().split("\n\n")[0]
    for word in ("Question:", "Command:", "Cost:", "Result:"):
        assert word in header


def test_there_are_sweeps():
    assert {path.stem for path in SWEEPS} >= {"objects", "sinkhorn", "temperature"}
