"""Services that a run's metrics go to beside its own files (run.loggers): Weights & Biases, MLflow, trackio.

Rank 0 writes. A run keeps its name there over restarts and resumes: loggers.json in its folder has it. A service that
fails is warned of once and gets nothing more until the next start of the workers; metrics.jsonl has everything.
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
# Events of a run that are worth a mark beside its curves.
MARKED = ("start", "resize", "recovered", "warning", "end")
# Most values that MLflow takes at once.
MLFLOW_BATCH = 100


@dataclass(frozen=True)
class Identity:
    """A run as services know it.

    Attributes:
        id: stays the same over resumes; new after --overwrite.
        name: the last part of its folder.
        group: the sweep that the run is a trial of.
        folder: the run's folder or URI.
        config: as resolved, dotted keys.
    """

    id: str
    name: str
    group: str | None
    folder: str
    config: dict[str, Any]


class Service(Protocol):
    """An open run at a service."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values after a step."""

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Mark an event."""

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Take a picture."""

    def close(self, *, done: bool) -> None:
        """Send what is left; `done`: the run has reached its last step."""


class WandbRun:
    """A run at Weights & Biases; WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY work as ever."""

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
        # W&B's own step only grows, and a restart begins at an earlier one.
        self._run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log({**values, "step": step})

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Log a mark; the last words of each kind are in the summary."""
        self._run.log({f"events/{name}": 1, "step": step})
        self._run.summary[f"last_{name}"] = json.dumps(dict(fields))

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log a row with the picture."""
        self._run.log({name: importlib.import_module("wandb").Image(picture), "step": step})

    def close(self, *, done: bool) -> None:
        """Finish; a run that is not done can be resumed."""
        self._run.finish(exit_code=0 if done else 1)


class TrackioRun:
    """A run at trackio, which knows a run by its name."""

    def __init__(self, run: Identity) -> None:
        name = f"{run.name}-{run.id}"
        module: Any = importlib.import_module("trackio")
        self._run = module.init(project=PROJECT, name=name, group=run.group, config=run.config, resume="allow")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log(dict(values), step=step)

    def event(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Log a mark, with the numbers of the event."""
        numbers = {key: value for key, value in fields.items() if isinstance(value, int | float)}
        self._run.log(
            {f"events/{name}": 1, **{f"events/{name}/{key}": value for key, value in numbers.items()}}, step=step
        )

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log a row with the picture."""
        self._run.log({name: importlib.import_module("trackio").Image(picture)}, step=step)

    def close(self, *, done: bool) -> None:
        """Finish."""
        self._run.finish()


class MlflowRun:
    """A run at MLflow, at MLFLOW_TRACKING_URI; the experiment is the sweep, or dora_ray."""

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
        """Log a mark; the last words of each kind are a tag."""
        self.metrics(step, {f"events/{name}": 1.0})
        self._client.set_tag(self._id, f"last_{name}", json.dumps(dict(fields)))

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Log the picture among those of its name."""
        self._client.log_image(self._id, picture, key=name, step=step)

    def close(self, *, done: bool) -> None:
        """Finish; KILLED can be resumed."""
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")


SERVICES: dict[str, Callable[[Identity], Service]] = {"wandb": WandbRun, "mlflow": MlflowRun, "trackio": TrackioRun}


def require_packages(names: Sequence[str]) -> None:
    """Raise ConfigError where the package of a logger is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.loggers={list(names)}: {', '.join(missing)} is not installed; pip install "
            f"'dora_ray[{','.join(missing)}]' on every node, or leave it out"
        )


def identify(run: str) -> Identity:
    """Return a run's identity, which is written down when it is first asked for."""
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
    """All services of a run.

    Args:
        run: the run's folder.
        names: of the services.
        warn: told the step, and why a service gets nothing more.
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
            self._warn(step, f"{name} gets nothing more until the next start of the workers: {error}")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on the values after a step."""
        for name, service in list(self._open.items()):
            self._guarded(name, step, service.metrics, step, values)

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Hand on an event, if it is one to be marked."""
        self._done = self._done or event == "end"
        if event not in MARKED:
            return
        step = int(fields.get("step", 0))
        for name, service in list(self._open.items()):
            self._guarded(name, step, service.event, step, event, fields)

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Hand on a picture."""
        for service_name, service in list(self._open.items()):
            self._guarded(service_name, step, service.picture, step, name, picture)

    def close(self) -> None:
        """Send what is left."""
        for name, service in list(self._open.items()):
            self._guarded(name, 0, functools.partial(service.close, done=self._done))
