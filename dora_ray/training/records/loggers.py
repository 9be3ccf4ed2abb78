"""Logging services that receive a run's metrics (run.loggers): Weights & Biases, MLflow, trackio.

Rank 0 writes. A run keeps its identity over restarts and resumes, in loggers.json in its folder. If a service fails,
one warning is logged and the service gets nothing more until the workers' next start; metrics.jsonl is complete.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dora_ray import files
from dora_ray.config_source import flatten, parse_yaml
from dora_ray.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

IDENTITY = "loggers.json"
PROJECT = "dora_ray"
# Events to mark beside the curves.
MARKED = ("start", "resize", "recovered", "warning", "end")
# Maximum number of parameters in one MLflow batch.
MLFLOW_BATCH = 100


@dataclass(frozen=True)
class Identity:
    """Identity of a run at the services.

    Attributes:
        id: stays the same over resumes; new after --overwrite.
        name: last part of the run's folder.
        group: the sweep, if the run is one of its trials.
        folder: the run's folder or URI.
        config: resolved configuration with dotted keys.
    """

    id: str
    name: str
    group: str | None
    folder: str
    config: dict[str, Any]


class Service(Protocol):
    """An open run at a service."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Log an event."""

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log a picture."""

    def close(self, *, done: bool) -> None:
        """Send pending data and close; `done`: the run has reached its last step."""


class WandbRun:
    """A run at Weights & Biases; respects WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY."""

    def __init__(self, run: Identity) -> None:
        self._run: Any = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            group=run.group,
            config=run.config,
            dir=None if files.is_remote(run.folder) else run.folder,
            resume="allow",
            allow_val_change=True,
        )
        # W&B's own step can only grow, but a restart goes back to an earlier step.
        self._run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log({**values, "step": step})

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Log a mark; the fields of the last event of each kind go to the summary."""
        self._run.log({f"events/{name}": 1, "step": step})
        self._run.summary[f"last_{name}"] = json.dumps(dict(fields))

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log a row with the picture."""
        self._run.log({name: importlib.import_module("wandb").Image(picture), "step": step})

    def close(self, *, done: bool) -> None:
        """Finish the run; exit code 1 if it is not done, so it can be resumed."""
        self._run.finish(exit_code=0 if done else 1)


class TrackioRun:
    """A run at trackio, which identifies runs by name."""

    def __init__(self, run: Identity) -> None:
        name = f"{run.name}-{run.id}"
        module: Any = importlib.import_module("trackio")
        self._run = module.init(project=PROJECT, name=name, group=run.group, config=run.config, resume="allow")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log(dict(values), step=step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Log a mark with the event's numeric fields."""
        numbers = {key: value for key, value in fields.items() if isinstance(value, int | float)}
        self._run.log(
            {f"events/{name}": 1, **{f"events/{name}/{key}": value for key, value in numbers.items()}}, step=step
        )

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log a row with the picture."""
        self._run.log({name: importlib.import_module("trackio").Image(picture)}, step=step)

    def close(self, *, done: bool) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowRun:
    """A run at MLflow (MLFLOW_TRACKING_URI); the experiment is the sweep's name, or dora_ray."""

    def __init__(self, run: Identity) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        entities: Any = importlib.import_module("mlflow.entities")
        self._metric, self._param = entities.Metric, entities.Param
        self._client = self._mlflow.MlflowClient()
        experiment = self._experiment(run.group or PROJECT)
        found = self._client.search_runs([experiment], f"tags.dora_ray_id = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"dora_ray_id": run.id, "folder": run.folder}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        params = [self._param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=params[first : first + MLFLOW_BATCH])

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step."""
        now = round(1000 * time.time())
        self._client.log_batch(self._id, [self._metric(key, float(value), now, step) for key, value in values.items()])

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Log a mark; the fields of the last event of each kind become a tag."""
        self.metrics(step, {f"events/{name}": 1.0})
        self._client.set_tag(self._id, f"last_{name}", json.dumps(dict(fields)))

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log the picture under its name."""
        self._client.log_image(self._id, picture, key=name, step=step)

    def close(self, *, done: bool) -> None:
        """Finish the run; KILLED if it is not done, so it can be resumed."""
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


SERVICES: dict[str, Callable[[Identity], Service]] = {"wandb": WandbRun, "mlflow": MlflowRun, "trackio": TrackioRun}


def require_packages(names: Sequence[str]) -> None:
    """Raise ConfigError if a logger's package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.loggers={list(names)}: {', '.join(missing)} is not installed; pip install "
            f"'dora_ray[{','.join(missing)}]' on every node, or leave it out"
        )


def identify(run: str) -> Identity:
    """Return a run's identity; the first call writes its id into the run's folder."""
    place = files.join(run, IDENTITY)
    if not files.exists(place):
        files.write_text(place, json.dumps({"id": uuid.uuid4().hex[:12]}) + "\n")
    config = files.join(run, "config.yaml")
    values = parse_yaml(files.read_text(config), config) if files.exists(config) else {}
    above, _, name = run.rstrip("/").rpartition("/")
    sweep, _, folder = above.rpartition("/")
    is_trial = folder == "trials" and files.exists(files.join(sweep, "sweep.yaml"))
    group = sweep.rpartition("/")[2] if is_trial else None
    return Identity(json.loads(files.read_text(place))["id"], name, group, run, flatten(values))


class Loggers:
    """All logging services of a run.

    Args:
        run: the run's folder.
        names: names of the services.
        warn: called with the step and a message when a service fails.
    """

    def __init__(self, run: str, names: Sequence[str], warn: Callable[[int, str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Service] = {}
        self._done = False
        for name in names:
            self._guarded(name, 0, self._begin, name, run)

    def _begin(self, name: str, run: str) -> None:
        self._open[name] = SERVICES[name](identify(run))

    def _guarded(self, name: str, step: int, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:  # noqa: BLE001  a service that is down must not end a training
            self._open.pop(name, None)
            self._warn(step, f"{name} failed and gets nothing more until the workers' next start: {error}")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step to all services."""
        for name, service in list(self._open.items()):
            self._guarded(name, step, service.metrics, step, values)

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Send an event to all services if it is one of `MARKED`."""
        self._done = self._done or event == "end"
        if event not in MARKED:
            return
        step = int(fields.get("step", 0))
        for name, service in list(self._open.items()):
            self._guarded(name, step, service.event, step, event, fields)

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Send a picture to all services."""
        for service_name, service in list(self._open.items()):
            self._guarded(service_name, step, service.picture, step, name, picture)

    def close(self) -> None:
        """Close all services."""
        for name, service in list(self._open.items()):
            self._guarded(name, 0, functools.partial(service.close, done=self._done))
