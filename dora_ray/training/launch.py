"""Launch a run: check everything, ingest missing segments, start the workers and follow them to the end."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import yaml

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS, complete_checkpoints, newest_meta
from dora_ray.clips.plan import Plan
from dora_ray.cluster.nodes import require_alike
from dora_ray.config import Config, load_config
from dora_ray.config_source import parse_yaml
from dora_ray.errors import CheckpointError, ConfigError, DoRAError
from dora_ray.store.ingest import IngestProgress
from dora_ray.store.losses import losses
from dora_ray.training.beginning import with_resolved_init
from dora_ray.training.elastic.requests import caught_signals
from dora_ray.training.ingest_beside import Ingest
from dora_ray.training.inputs import Inputs, check_videos, make_inputs, require_decode_nodes, store_of
from dora_ray.training.measuring import prepare
from dora_ray.training.records.checkpoint import require_plan
from dora_ray.training.records.heartbeat import Heartbeat
from dora_ray.training.records.journal import CONFIG, MISSING_FRAMES, add_event, read_metrics, read_status, write_status
from dora_ray.training.records.loggers import require_packages
from dora_ray.training.records.tail import RunTail
from dora_ray.training.shown import TrainingProgress
from dora_ray.training.trainer import check_resources, connect, on_devices, run_on_ray
from dora_ray.training.worker import record_failure, train_loop
from dora_ray.training.worlds import Job, LocalWorld, OneRankError
from dora_ray.video.index import VideoIndex
from dora_ray.weights import require_architecture

logger = logging.getLogger(__name__)

OnMetrics = Callable[[dict[str, Any]], None]
OnIngest = Callable[[IngestProgress], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: the run's folder.
        metrics: last line of metrics.
        checkpoint: folder of the last checkpoint.
    """

    path: str
    metrics: dict[str, Any] = field(repr=False)
    checkpoint: str


def train(
    config: Config | str | dict[str, Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    on_metrics: OnMetrics | None = None,
    on_ingest: OnIngest | None = None,
) -> Run:
    """Train an encoder.

    Args:
        config: a Config, or any source that `load_config` accepts. With `resume` it may be left out: the run in `out`
            keeps its configuration.
        out: folder or URI of the run, reachable from every node. Default: runs/<time>.
        resume: continue from the newest checkpoint in `out`.
        overwrite: delete the run in `out` first.
        progress: show a bar in a terminal or a notebook; elsewhere log a line now and then.
        on_metrics: called in this process with every new line of metrics.
        on_ingest: called in this process while videos are ingested.

    Raises:
        ConfigError, VideoError, CheckpointError, ClusterError: raised before anything is written or a GPU is requested.
        DivergenceError: a value was not finite.
    """
    run = files.absolute(out if out is not None else _default_run())
    config = prepare(load_config(config) if config is not None else saved_config(run, resume=resume))
    _check_folder(run, config, resume=resume, overwrite=overwrite)
    require_packages(config.run.loggers)
    config, given = with_resolved_init(config, run, resume=resume, overwrite=overwrite)
    if given is not None:
        logger.info("%s", given)
    store = store_of(config, run)
    indexes = check_videos(config, store=store)
    shown = TrainingProgress(config, enabled=progress)
    on_ingest = _both(shown.ingest, on_ingest)
    with _telling_where_it_stopped(run, config), shown, connect(config):
        if config.cluster.num_workers != 0:
            require_alike([index.path for index in indexes])
        placed = on_devices(config)
        check_resources(placed)
        require_decode_nodes(placed)
        inputs = make_inputs(config, store, on_ingest)
        if resume:
            _check_resume(run, config, inputs.plan)
        job = Job(placed, inputs.plan, run)
        videos = f"{len(indexes)} video{'s' if len(indexes) > 1 else ''}"
        logger.info("%s, %d places where a clip may start", videos, inputs.plan.clips_per_epoch)
        _prepare_folder(job, config, inputs, overwrite=overwrite)
        shown.starting()
        with Heartbeat(run), RunTail(run, _both(shown.metrics, on_metrics), shown.event):
            _execute(job, inputs, store, on_ingest)
    return _finished(run)


def _both(one: Callable[[T], None], other: Callable[[T], None] | None) -> Callable[[T], None]:
    """Return a function that calls both."""

    def call(value: T) -> None:
        one(value)
        if other is not None:
            other(value)

    return call


@contextmanager
def _telling_where_it_stopped(run: str, config: Config) -> Iterator[None]:
    """Give KeyboardInterrupt a message: the step, the checkpoint, and the command that continues the run."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        newest = newest_meta(files.join(run, CHECKPOINTS))
        if newest is None:
            begin = " with --overwrite" if files.exists(files.join(run, CONFIG)) else ""
            said = f"Stopped before the first checkpoint. Ingested frames are kept: begin again{begin}."
        else:
            folder, meta = newest
            again = shlex.join(["dora-ray", "train", "--resume", "--out", run])
            said = f"Stopped at step {meta.step} of {config.optim.steps}; checkpoint saved: {folder}\nContinue: {again}"
        raise KeyboardInterrupt(said) from interrupt


def _default_run() -> str:
    """Return a folder named after the current time, below the home folder in a Ray job (Ray deletes the job's own)."""
    name = f"runs/{datetime.now():%Y-%m-%d-%H%M%S}"
    return f"~/dora-ray/{name}" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else name


@dataclass(frozen=True)
class Checked:
    """A run that has passed all checks.

    Attributes:
        run, store: absolute folders or URIs.
        given: sentence about the initial weights; None if they are random.
        indexes: the indexes of its videos.
    """

    run: str
    store: str
    given: str | None
    indexes: list[VideoIndex]


def check(
    config: Config, *, out: str | os.PathLike[str] | None = None, resume: bool = False, overwrite: bool = False
) -> Checked:
    """Run the checks of `train` (folder, images, videos) without starting Ray or writing anything."""
    run = files.absolute(out if out is not None else _default_run())
    config = prepare(config)
    _check_folder(run, config, resume=resume, overwrite=overwrite)
    require_packages(config.run.loggers)
    config, given = with_resolved_init(config, run, resume=resume, overwrite=overwrite)
    return Checked(run, store_of(config, run), given, check_videos(config))


def saved_config(run: str, *, resume: bool = True) -> Config:
    """Return the saved configuration of a run, for a resume without a configuration.

    Raises:
        ConfigError: `resume` is false, or the folder holds no run.
    """
    if not resume:
        raise ConfigError("no configuration was given: name a recipe (paper, released, tiny) or a YAML file")
    path = files.join(run, CONFIG)
    if not files.exists(path):
        raise ConfigError(f"{run} has no {CONFIG}, so there is no run to resume: give the run's folder")
    return load_config(parse_yaml(files.read_text(path), path))


def _prepare_folder(job: Job, config: Config, inputs: Inputs, *, overwrite: bool) -> None:
    """Create the run's folder: save the configuration as given and reset the status, which may say "failed"."""
    try:
        if overwrite:
            files.remove(job.run)
        files.write_text(files.join(job.run, CONFIG), yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        write_status(job.run, state="starting")
        add_event(job.run, "launch")
        for path, text in losses(inputs.stored).items():
            add_event(job.run, MISSING_FRAMES, video=path, missing=text)
    except OSError as error:
        raise ConfigError(f"{job.run} cannot be written ({error}): give another --out") from error


def _check_folder(run: str, config: Config, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other: continue the run, or start it again")
    if overwrite and store_of(config, run).startswith(run.rstrip("/") + "/"):
        raise ConfigError(
            f"data.store={config.data.store} is inside {run}, which --overwrite would remove: move the store"
        )
    names = files.list_names(run)
    if not names:
        if resume:
            logger.warning("%s holds no run yet, so there is nothing to resume: training starts at step 0", run)
        if files.exists(run) and not files.is_remote(run) and not os.path.isdir(run):
            raise ConfigError(f"{run} is a file: give a folder")
        return
    is_run = CONFIG in names
    if (resume or overwrite) and not is_run:
        raise ConfigError(
            f"{run} is not empty and not a run of dora_ray (no {CONFIG}): give another folder. Nothing was changed."
        )
    if not resume and not overwrite:
        if not is_run:
            raise ConfigError(f"{run} is not empty ({', '.join(names[:4])}) and holds no run: choose another --out.")
        raise ConfigError(
            f"{run} already holds a run{_how_far(run)}. Continue with --resume, replace with --overwrite, or choose "
            "another --out."
        )


def _how_far(run: str) -> str:
    """Return the run's progress in brackets, empty if its status does not tell."""
    try:
        status = read_status(run)
    except (ValueError, TypeError):  # damaged, by a full disk
        status = {}
    return f" ({status['step']} of {status['steps']} steps)" if {"step", "steps"} <= status.keys() else ""


def _check_resume(run: str, config: Config, plan: Plan) -> None:
    """Raise CheckpointError, before anything starts, if the newest checkpoint has another architecture or plan."""
    newest = newest_meta(files.join(run, CHECKPOINTS))
    if newest is not None:
        require_architecture(newest[0], config.model_dump(mode="json"))
        require_plan(*newest, plan)


def _execute(job: Job, inputs: Inputs, store: str, on_ingest: OnIngest | None) -> None:
    """Run the workers to the end, and the rest of the ingest in the background.

    Raises:
        DoRAError: the error that stopped the run.
    """
    config = job.config
    try:
        if config.cluster.num_workers == 0:
            ingest = Ingest(config, store, inputs, on_ingest, lambda _: None)
            with caught_signals(signal.SIGINT, signal.SIGTERM), ingest.running():
                train_loop(job, LocalWorld(job, inputs.contents, ingest.has_ended))
            return
        from dora_ray.clips.dataset import clear_ingest_end, publish_ingest_end

        clear_ingest_end(job.run)
        ingest = Ingest(config, store, inputs, on_ingest, functools.partial(publish_ingest_end, job.run))
        with ingest.running():
            run_on_ray(job, inputs.contents)
    except OneRankError as error:
        record_failure(job.run, error.told)
        raise error.told from error
    except DoRAError as error:
        record_failure(job.run, error)
        raise


def _finished(run: str) -> Run:
    checkpoint = next(complete_checkpoints(files.join(run, CHECKPOINTS)), None)
    if checkpoint is None:
        raise CheckpointError(f"{run} ended without a checkpoint: see {files.join(run, 'events.jsonl')}")
    lines = read_metrics(run)
    return Run(run, lines[-1] if lines else {}, checkpoint)
