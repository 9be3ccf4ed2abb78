"""Loggers: real MLflow and W&B (offline) where they are installed, and a module that takes notes in their place."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image as PillowImage

from dora_ray.config import load_config
from dora_ray.errors import ConfigError
from dora_ray.training.records import loggers
from dora_ray.training.records.journal import Journal, read_events, read_metrics
from dora_ray.training.records.loggers import identify, require_packages


class Notes(types.ModuleType):
    """A stand-in for wandb and trackio: notes every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.summary: dict[str, str] = {}
        self.broken = False

    def init(self, **words: Any) -> Notes:
        self.calls.append(("init", words))
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.calls.append(("define_metric", {"name": name, "step_metric": step_metric}))

    class Image:
        """Their pictures: made of one of Pillow's."""

        def __init__(self, picture: PillowImage.Image) -> None:
            self.size = picture.size

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("the service is down")
        self.calls.append(("log", {"step": step, **values}))

    def finish(self, **words: Any) -> None:
        self.calls.append(("finish", words))

    def called(self, name: str) -> list[dict[str, Any]]:
        return [words for call, words in self.calls if call == name]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """The folder of a sweep's trial."""
    folder = tmp_path / "sweep" / "trials" / "k=3"
    folder.mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.yaml").write_text("question: q\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(load_config("tiny").model_dump(mode="json")))
    return str(folder)


def attempt(run: str, first: int, steps: int, *names: str, end: bool = False) -> None:
    journal = Journal(run, step=first, num_steps=4, world_size=2, entered=0.0, loggers=names)
    for step in range(first + 1, first + steps + 1):
        journal.metrics(step, {"loss": 10.0 / step})
        if step % 2:
            journal.picture(step, "objects", PillowImage.new("RGB", (20 + step, 8), "red"))
    if end:
        journal.event("end", step=first + steps)
    journal.close()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_hears_of_every_attempt_as_one_run(name: str, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(name)
    monkeypatch.setitem(sys.modules, name, notes)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    attempt(run, 0, 3, name)
    attempt(run, 2, 2, name, end=True)
    begun = notes.called("init")
    assert len(begun) == 2
    assert begun[0] == begun[1], "the same run, resumed"
    assert (begun[0]["resume"], begun[0]["group"], begun[0]["project"]) == ("allow", "sweep", "dora_ray")
    assert begun[0]["config"]["optim.steps"] == 400
    logged = notes.called("log")
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 3, 4]
    assert [line["step"] for line in logged if line.get("events/start")] == [0, 2]
    assert logged[-1]["events/end"] == 1
    assert [(line["step"], line["objects"].size) for line in logged if "objects" in line] == [
        (1, (21, 8)),
        (3, (23, 8)),
        (3, (23, 8)),
    ]
    assert len(notes.called("finish")) == 2
    if name == "wandb":
        assert [words["exit_code"] for words in notes.called("finish")] == [1, 0]
        assert notes.called("define_metric")[0] == {"name": "*", "step_metric": "step"}
        assert '"attempt": 2' in notes.summary["last_start"]


def test_a_service_that_fails_is_warned_of_once_and_training_goes_on(run: str, monkeypatch) -> None:
    notes = Notes("wandb")
    monkeypatch.setitem(sys.modules, "wandb", notes)
    notes.broken = True
    attempt(run, 0, 3, "wandb")
    (warning,) = [event["message"] for event in read_events(run) if event["event"] == "warning"]
    assert warning == "wandb failed and gets nothing more until the workers' next start: the service is down"
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]


def test_a_service_that_cannot_be_opened_is_warned_of(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loggers.SERVICES, "trackio", lambda identity: 1 / 0)
    attempt(run, 0, 1, "trackio")
    assert [event["message"] for event in read_events(run) if event["event"] == "warning"] == [
        "trackio failed and gets nothing more until the workers' next start: division by zero"
    ]


def test_identity_outlives_attempts_and_a_plain_run_has_no_group(run: str, tmp_path: Path) -> None:
    assert identify(run) == identify(run)
    (tmp_path / "walk").mkdir()
    plain = identify(str(tmp_path / "walk"))
    assert (plain.name, plain.group, plain.config) == ("walk", None, {})
    assert plain.id != identify(run).id


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mlflow is not installed; pip install 'dora_ray\[mlflow\]'"):
        require_packages(load_config("tiny", "run.loggers=mlflow").run.loggers)
    with pytest.raises(ConfigError, match="'wandb', 'mlflow' or 'trackio'"):
        load_config("tiny", "run.loggers=[comet]")


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="the extra mlflow is not installed")
@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_itself(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    attempt(run, 0, 3, "mlflow")
    attempt(run, 2, 2, "mlflow", end=True)
    assert [event for event in read_events(run) if event["event"] == "warning"] == []
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.steps"] == "400"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 3, 4]
    assert '"attempt": 2' in found.data.tags["last_start"]
    pictures = sorted(Path(run).parents[2].glob("mlflow/**/images/objects*step*.png"))
    assert {PillowImage.open(path).size for path in pictures} == {(21, 8), (23, 8)}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra wandb is not installed")
@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_itself_offline(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    attempt(run, 0, 2, "wandb")
    assert [event for event in read_events(run) if event["event"] == "warning"] == []
    (written,) = Path(run).glob("wandb/offline-run-*/run-*.wandb")
    assert written.stem == f"run-{identify(run).id}"
    assert written.stat().st_size > 1000
    (picture,) = Path(run).glob("wandb/offline-run-*/files/media/images/objects_*.png")
    assert PillowImage.open(picture).size == (21, 8)


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="the extra trackio is not installed")
@pytest.mark.filterwarnings("ignore")  # its own
def test_trackio_itself(run: str, tmp_path: Path) -> None:
    """In a process of its own: trackio chooses its folder when it is imported, and serves from threads."""
    program = (
        "from tests.training.records.test_loggers import attempt; from dora_ray.training.records.journal import "
        f"read_events; attempt({run!r}, 0, 2, 'trackio'); "
        f"assert not [e for e in read_events({run!r}) if e['event'] == 'warning'], read_events({run!r})"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=environment)
    (picture,) = (tmp_path / "trackio").glob("**/*.png")
    assert PillowImage.open(picture).size == (21, 8)
