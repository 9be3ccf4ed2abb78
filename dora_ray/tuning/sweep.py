"""A sweep: many runs of the same `train`, side by side on one Ray cluster, and what they found.

    <sweep>/
        sweep.yaml      the file as it was understood, overrides included
        trials/NAME/    a run's folder each
        errors/NAME.txt what ended a trial that failed
        store/          one frame store for all trials, unless data.store names another
        results.csv     a line a trial
        report.html
        tune/           Ray Tune's own books

Ray Tune starts the trials, a few at a time, and stops the worse ones if asked to. What is done and what is missing is
decided by the folders above, so that a sweep resumes after any kind of end.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from dora_ray import files
from dora_ray.config import Config, load_config
from dora_ray.errors import ConfigError
from dora_ray.reporting.pages import report
from dora_ray.training.launch import check_videos, ingest_videos, train
from dora_ray.training.trainer import check_resources, connect, on_devices
from dora_ray.tuning.results import (
    Row,
    best_point,
    collect,
    error_file,
    stopped_file,
    trial_folder,
    trial_status,
    write_csv,
    write_spec,
)
from dora_ray.tuning.space import SweepSpec, Trial, expand, load_sweep
from dora_ray.video.synthetic import make_photo_classes

logger = logging.getLogger(__name__)

# What Ray reserves for the process that launches a trial's workers and then waits for them.
DRIVER_CPUS = 0.1
# ASHA compares trials first after this share of their steps; earlier, warm-up is all there is to see.
GRACE_SHARE = 0.25
OnTrial = Callable[[str, str], None]


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        path: its folder.
        results: one row a trial, failed ones included.
        best: the trials of the best point, one a seed; empty when none has the metric.
    """

    path: str
    results: list[Row] = field(repr=False)
    best: list[Row]


def sweep(
    source: str | Path | Mapping[str, Any],
    *overrides: str,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_trial: OnTrial | None = None,
) -> Sweep:
    """Run all trials of a sweep's file that have not been run.

    Args:
        source: the file, or its content as a mapping.
        overrides: "section.key=value" for all trials, or "metric=knn" and the like for the sweep itself.
        out: folder or URI, reachable from every node; not given: runs/sweep-<time>.
        resume: run what is missing or failed in the sweep that is in `out`.
        on_trial: called in this process with the name and status of a trial that ended.

    Raises:
        ConfigError, VideoError, ClusterError: before any trial is started.
        KeyboardInterrupt: interrupted; what is there is in the report, and the rest can be resumed.
    """
    folder = files.absolute(out if out is not None else f"runs/sweep-{datetime.now():%Y-%m-%d-%H%M%S}")
    spec = load_sweep(source, *overrides)
    _check_folder(folder, spec, resume=resume)
    trials = [_place(trial, spec, folder) for trial in expand(spec)]
    configs = _distinct_data([trial.config for trial in trials])
    for config in configs:
        check_videos(config)
    with connect(_largest(trials)):
        limit = _trials_at_a_time(trials, spec)
        write_spec(files.join(folder, "sweep.yaml"), spec)
        _make_images(trials, folder)
        for config in configs:
            if config.data.source == "store":
                assert config.data.store is not None
                ingest_videos(config, config.data.store)
        pending = [trial for trial in trials if trial_status(folder, trial.name) not in ("done", "stopped")]
        logger.info("%d of %d trials to run, %d at a time", len(pending), len(trials), limit)
        if pending:
            _run_trials(folder, spec, pending, limit=limit, on_trial=on_trial)
    finished = _finish(folder, spec, trials)
    if any(row.status == "missing" for row in finished.results):
        # Ray Tune catches Ctrl-C and returns what it has.
        raise KeyboardInterrupt
    return finished


def _check_folder(folder: str, spec: SweepSpec, *, resume: bool) -> None:
    """Refuse a folder in use, and a resume of another sweep."""
    names = files.list_names(folder)
    if not names:
        return
    if not resume:
        raise ConfigError(
            f"{folder} is in use ({', '.join(names[:4])}): continue it with --resume, or give another --out"
        )
    if "sweep.yaml" not in names:
        raise ConfigError(
            f"{folder} is not empty and not a sweep (no sweep.yaml): give another folder. Nothing was changed."
        )
    before = load_sweep(yaml.safe_load(files.read_text(files.join(folder, "sweep.yaml"))))
    ours, theirs = spec.model_dump(), before.model_dump()
    shaping = [
        key
        for key in ours
        if key not in ("question", "max_concurrent_trials", "metric", "mode") and ours[key] != theirs[key]
    ]
    if shaping:
        differences = ", ".join(f"{key} was {theirs[key]!r} and is {ours[key]!r}" for key in shaping)
        raise ConfigError(f"{folder} holds another sweep: {differences}. Give the same file, or another --out.")


def _place(trial: Trial, spec: SweepSpec, folder: str) -> Trial:
    """The trial with the sweep's own store and labeled images, where the configuration names none."""
    texts = []
    if trial.config.data.store is None:
        texts.append(f"data.store={json.dumps(files.join(folder, 'store'))}")
    if spec.photographs and trial.config.evaluation.images is None:
        if files.is_remote(folder):
            raise ConfigError(
                f"photographs cannot be written to {folder}: "
                "name a labeled folder with evaluation.images, or a local --out"
            )
        texts.append(f"evaluation.images={json.dumps(_images(folder))}")
    return trial.model_copy(update={"config": load_config(trial.config, *texts)})


def _images(folder: str) -> str:
    return files.join(folder, "images")


def _make_images(trials: Sequence[Trial], folder: str) -> None:
    """The demo's labeled photographs, where a trial is evaluated on them."""
    if any(trial.config.evaluation.images == _images(folder) for trial in trials) and not files.exists(_images(folder)):
        make_photo_classes(_images(folder), seed=0)


def _distinct_data(configs: Sequence[Config]) -> list[Config]:
    """One configuration for each way in which the trials read their videos."""
    return list({(config.data.model_dump_json(), config.clip.model_dump_json()): config for config in configs}.values())


def _cpus(config: Config) -> float:
    """CPUs that one trial keeps busy: driver, workers and a decode task; a local trial's worker is its driver."""
    if config.cluster.num_workers == 0:
        return config.cluster.cpus_per_worker
    return DRIVER_CPUS + config.max_workers * config.cluster.cpus_per_worker + config.cluster.decode_cpus


def _largest(trials: Sequence[Trial]) -> Config:
    """The configuration that asks for the most CPUs, with room for a driver: what a cluster started here must hold."""
    config = max((trial.config for trial in trials), key=_cpus)
    workers = max(1, config.max_workers)
    return load_config(
        config, f"cluster.num_workers={workers}", f"cluster.decode_cpus={config.cluster.decode_cpus + DRIVER_CPUS}"
    )


def _trials_at_a_time(trials: Sequence[Trial], spec: SweepSpec) -> int:
    """How many trials fit beside each other. More would wait for each other's workers for ever.

    Raises:
        ClusterError: not even one fits.
    """
    import ray

    largest = on_devices(_largest(trials))
    check_resources(largest)
    present = ray.cluster_resources()
    need = max(_cpus(trial.config) for trial in trials)
    fits = present.get("CPU", 0.0) / need
    if largest.cluster.use_gpu:
        fits = min(fits, present.get("GPU", 0.0) / largest.max_workers)
    # On a cluster that can grow, check_resources has passed with nothing there yet: one trial then makes it grow.
    return min(max(1, int(fits)), spec.max_concurrent_trials or len(trials), len(trials))


def _run_trials(
    folder: str, spec: SweepSpec, pending: Sequence[Trial], *, limit: int, on_trial: OnTrial | None
) -> None:
    """Let Ray Tune run the trials; how they ended is in their folders afterwards."""
    # Ray Tune's newer output prints a box to standard output whatever `verbose` says; results alone belong there.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune
    from ray.exceptions import ActorDiedError

    for trial in pending:
        files.remove(error_file(folder, trial.name))
    configs = {trial.name: trial.config.model_dump(mode="json") for trial in pending}
    driver = functools.partial(
        _drive, folder=folder, configs=configs, metric=spec.metric if spec.scheduler == "asha" else None
    )
    ranked = {"metric": spec.metric, "mode": spec.mode} if spec.scheduler == "asha" else {}
    tuner = tune.Tuner(
        tune.with_resources(driver, _reserve(pending)),
        param_space={"trial": tune.grid_search([trial.name for trial in pending])},
        tune_config=tune.TuneConfig(max_concurrent_trials=limit, scheduler=_scheduler(spec, pending), **ranked),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[_announcer(folder, on_trial)],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    # An older attempt's books name other trials: Tune would mix both.
    files.remove(files.join(folder, "tune"))
    for result in tuner.fit():
        done = bool((result.metrics or {}).get("done"))
        # Ray Tune ends a stopped trial by ending its actor, and may call that death the trial's error. What goes
        # wrong inside a trial is written down by the trial itself.
        stopped = spec.scheduler == "asha" and isinstance(result.error, ActorDiedError)
        name = (result.config or {}).get("trial", "")
        _note_end(folder, name, None if stopped else result.error, done=done or stopped)


def _reserve(pending: Sequence[Trial]) -> dict[str, float]:
    """What Ray Tune reserves for a trial's driver: nearly nothing, except where the driver itself trains."""
    local = [trial.config for trial in pending if trial.config.cluster.num_workers == 0]
    if not local:
        return {"CPU": DRIVER_CPUS}
    gpu = {"GPU": 1.0} if any(on_devices(config).cluster.use_gpu for config in local) else {}
    return {"CPU": max(config.cluster.cpus_per_worker for config in local)} | gpu


def _scheduler(spec: SweepSpec, pending: Sequence[Trial]) -> Any:
    if spec.scheduler == "none":
        return None
    from ray.tune.schedulers import AsyncHyperBandScheduler

    steps = max(trial.config.optim.steps for trial in pending)
    return AsyncHyperBandScheduler(
        time_attr="step", max_t=steps + 1, grace_period=max(1, round(GRACE_SHARE * steps)), reduction_factor=2
    )


def _drive(point: dict[str, Any], *, folder: str, configs: dict[str, dict[str, Any]], metric: str | None) -> None:
    """One trial, in an actor of Ray Tune's. An error is written down and ends this trial alone."""
    from ray import tune

    trial = point["trial"]

    def forward(line: dict[str, Any]) -> None:
        if metric in line:
            tune.report({metric: line[metric], "step": line["step"]})

    try:
        run = train(
            load_config(configs[trial]),
            out=trial_folder(folder, trial),
            resume=True,
            on_metrics=forward if metric else None,
        )
    except Exception as error:  # noqa: BLE001  whatever ends a trial, the others go on
        _write_error(folder, trial, error)
        return
    if metric is None:
        tune.report({name: value for name, value in run.metrics.items() if isinstance(value, int | float)})


def _write_error(folder: str, name: str, error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    files.write_text(error_file(folder, name), f"{type(error).__name__}: {error}\n\n{text}")


def _note_end(folder: str, name: str, error: Exception | None, *, done: bool) -> None:
    """Write down an end that the trial could not: a killed process, or the scheduler's stop (`done`, for Ray Tune)."""
    if not name or trial_status(folder, name) != "missing":
        return
    if error is not None:
        _write_error(folder, name, error)
    elif done:
        files.write_text(stopped_file(folder, name), "")


def _announcer(folder: str, on_trial: OnTrial | None) -> Any:
    """A Ray Tune callback that tells of every trial's end."""
    from ray import tune

    class Announcer(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._tell(trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self._tell(trial)

        def _tell(self, trial: Any) -> None:
            if on_trial is not None:
                name = trial.config["trial"]
                status = trial_status(folder, name)
                on_trial(name, "stopped" if status == "missing" else status)

    return Announcer()


def _finish(folder: str, spec: SweepSpec, trials: Sequence[Trial]) -> Sweep:
    """Write the table and the page."""
    rows = collect(folder, trials)
    write_csv(files.join(folder, "results.csv"), rows)
    report(folder)
    if rows and all(row.status == "failed" for row in rows):
        logger.warning("all %d trials failed; the first: %s", len(rows), rows[0].error)
    return Sweep(folder, rows, best_point(rows, spec.metric, spec.mode))
