"""What a sweep would take, before anything is started or written; and the command's exit status after failures."""

from __future__ import annotations

import re

import pytest
import yaml

from dora_ray.cli import main
from dora_ray.errors import ConfigError
from dora_ray.tuning import sweep as sweep_module
from dora_ray.tuning.forecast import forecast
from dora_ray.tuning.results import read_csv
from tests.tuning.folders import write_sweep


def _spec(small) -> dict:
    return {
        "overrides": list(small),
        "space": {"tracking.num_objects": [1, 2], "optim.lr": [1.0e-3, 2.0e-3, 3.0e-3]},
        "seeds": [0, 1],
    }


def test_a_forecast_counts_trials_and_measures_a_step(small, tmp_path):
    facts = forecast(_spec(small), out=tmp_path / "sweep")
    assert (facts["trials"], facts["points"], facts["already done"]) == (12, 6, 0)
    assert facts["workers per trial"] == "its driver"
    assert "measured here on 4 points" in facts["seconds per step"]
    assert "startup and evaluations of 12 trials" in facts["time"]
    assert "MB of checkpoints" in facts["disk"]
    assert not (tmp_path / "sweep").exists()


def test_a_tour_need_not_exist_to_be_counted(small, tmp_path):
    spec = _spec([word for word in small if not word.startswith("data.videos")]) | {"tour": {"seconds": 600}}
    facts = forecast(spec, out=tmp_path / "sweep")
    assert facts["trials"] == 12
    assert not (tmp_path / "sweep").exists()


def test_a_forecast_is_checked_like_a_sweep(small, tmp_path):
    with pytest.raises(ConfigError, match="sets a key that this sweep varies"):
        forecast(_spec(small), "optim.lr=1", out=tmp_path)


def test_dry_run_prints_it(small, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(_spec(small)))
    assert main(["sweep", str(file), "--dry-run", "--out", str(tmp_path / "sweep")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^trials +12$", out, re.MULTILINE)
    assert "measured here" in out


@pytest.mark.parametrize(("values", "status"), [([[0.2], [0.3]], 0), ([[0.2], [None]], 1)])
def test_a_failed_trial_is_the_commands_exit_status(small, tmp_path, monkeypatch, capsys, values, status):
    folder = write_sweep(tmp_path / "done", values)
    rows = read_csv(str(folder / "results.csv"))
    found = sweep_module.Sweep(str(folder), rows, [])
    monkeypatch.setattr(sweep_module, "sweep", lambda *args, **named: found)
    assert main(["sweep", str(folder / "sweep.yaml")]) == status
    out, err = capsys.readouterr()
    assert ("1 done, 1 failed" in out) == (status == 1)
    if status:
        assert "1 of 2 trials failed" in err
        assert "--resume" in err
