"""A sweep: many runs of `train` side by side on one Ray cluster, with tables and pages of their results.

    <sweep>/
        sweep.yaml      parsed sweep file, overrides included
        base.yaml       configuration that all trials start from
        trials/NAME/    run folder of each trial
        trials.jsonl    points proposed by Optuna, in order
        errors/NAME.txt error of a failed trial
        stopped/NAME    marker of a trial that the scheduler stopped
        images/  tours/ labeled photographs and films, if the sweep file asks for them
        store/          one frame store for all trials, unless data.store names another
        status.json     progress; heartbeat.json shows that the sweep is alive
        results.csv     one line per trial; also results.parquet, report.md
        report.html     and trials/NAME/report.html for each trial
        tune/           Ray Tune's own folder: ResultGrid, ExperimentAnalysis, TensorBoard

Ray Tune starts the trials, as many at a time as fit on the cluster, and may stop the worse ones early. The folders
above alone decide what is done and what is missing, so a sweep can resume after any failure, and grow: all its trials
are given to Ray Tune again, and finished ones repeat their reports.
"""

from __future__ import annotations

import functools
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
from dora_ray.store.ingest import IngestProgress
from dora_ray.training.records.heartbeat import Heartbeat
from dora_ray.training.trainer import check_resources, connect, on_devices
from dora_ray.tuning.baseline import measure_baseline
from dora_ray.tuning.capacity import DRIVER_CPUS, Need
from dora_ray.tuning.data import (
    check_given_weights,
    check_indexes,
    distinct_data,
    find_films,
    ingest_all,
    make_images,
    make_tours,
    place,
    with_absolute_values,
)
from dora_ray.tuning.driver import BASE, SPEC
from dora_ray.tuning.progress import SweepProgress, read_points, summarize_sweep
from dora_ray.tuning.results import (
    Row,
    best_point,
    collect,
    error_file,
    read_spec,
    trial_folder,
    trial_status,
    write_csv,
    write_parquet,
    write_spec,
)
from dora_ray.tuning.space import SweepSpec, Trial, base_config, expand, load_sweep, make_trial
from dora_ray.tuning.tuner import OnProgress, run_through_lost_memory, run_trials

logger = logging.getLogger(__name__)

OnIngest = Callable[[IngestProgress], None]


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        path: the sweep's folder.
        results: one row per trial, failed ones included.
        best: the trials of the best point, one per seed; empty if no trial has the metric.
    """

    path: str
    results: list[Row] = field(repr=False)
    best: list[Row]


def sweep(
    source: str | Path | Mapping[str, Any],
    *overrides: str,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
    on_ingest: OnIngest | None = None,
) -> Sweep:
    """Run all trials of a sweep file that are not done yet.

    Args:
        source: the file, or its content as a mapping.
        overrides: "section.key=value" for all trials, or "metric=knn" and the like for the sweep itself.
        out: folder or URI, reachable from every node. Default: runs/sweep-<time>.
        resume: run the missing, new or failed trials of the sweep in `out`.
        on_progress: called in this process with every update of a trial.
        on_ingest: called in this process while videos are ingested, before the first trial.

    Raises:
        ConfigError, VideoError, ClusterError: raised before any trial starts.
        KeyboardInterrupt: interrupted; finished trials are in the report, the rest can be resumed.
    """
    if resume and out is None:
        raise ConfigError("--resume needs the sweep's folder: name it with --out")
    folder = files.absolute(out if out is not None else f"runs/sweep-{datetime.now():%Y-%m-%d-%H%M%S}")
    spec = with_absolute_values(load_sweep(source, *overrides))
    check_folder(folder, spec, resume=resume)
    base = place(base_config(spec), spec, folder)
    trials = [make_trial(base, trial.values) for trial in expand(spec)]
    configs = distinct_data([trial.config for trial in trials])
    find_films(configs, spec, folder)
    if not resume:
        check_given_weights([trial.config for trial in trials], folder)
    write_spec(files.join(folder, SPEC), spec)
    files.write_text(files.join(folder, BASE), yaml.safe_dump(base.model_dump(mode="json"), sort_keys=False))
    with Heartbeat(folder):
        make_tours(spec, folder)
        make_images(base, folder)
        check_indexes(configs)
        with connect(_cluster(trials)):
            check_resources(on_devices(_largest(trials)))
            return _run(folder, spec, base, trials, configs, on_progress, on_ingest)


def _run(
    folder: str,
    spec: SweepSpec,
    base: Config,
    trials: Sequence[Trial],
    configs: Sequence[Config],
    on_progress: OnProgress | None,
    on_ingest: OnIngest | None,
) -> Sweep:
    """Ingest, run the trials and write the results, after all checks and with Ray connected."""
    progress = _progress(folder, spec, base, trials)
    progress.write("starting", [], force=True)
    try:
        ingest_all(configs, on_ingest)
        logger.info("%d of %d trials to run", progress.trials - len(progress.ended), progress.trials)
        known = functools.partial(known_trials, folder, spec, base, trials)
        if len(progress.ended) < progress.trials:
            run = functools.partial(
                run_trials,
                *(folder, spec, base, trials, progress, lambda: _write_pages(folder, collect(folder, known()))),
                on_progress=on_progress,
            )
            run_through_lost_memory(run, base.cluster.max_failures)
        measure_baseline(folder, [trial for trial in known() if trial_status(folder, trial.name) == "done"])
        rows = collect(folder, known())
        missing = sum(row.status == "missing" for row in rows) or progress.trials - len(rows)
        failed = any(row.status == "failed" for row in rows)
        # Before the pages, which show it.
        progress.write("interrupted" if missing else "failed" if failed else "done", [], force=True)
        _write_pages(folder, rows)
    except BaseException as error:
        progress.write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", [], force=True)
        raise
    if missing:
        # Ray Tune catches Ctrl-C and returns its partial results.
        logger.warning("%d of %d trials are missing: run them with --resume --out %s", missing, progress.trials, folder)
        raise KeyboardInterrupt
    return Sweep(folder, rows, best_point(rows, spec.metric, spec.mode))


def check_folder(folder: str, spec: SweepSpec, *, resume: bool) -> None:
    """Refuse a folder in use, and a resume with another sweep file; it may add seeds, values and samples."""
    names = files.list_names(folder)
    if not names:
        if resume:
            logger.warning("%s holds no sweep yet, so there is nothing to resume: the sweep starts", folder)
        return
    if SPEC in names and "trials" not in names:
        return  # it failed before its first trial
    if not resume:
        raise ConfigError(_holds(folder, names))
    if SPEC not in names:
        raise ConfigError(
            f"{folder} is not empty and not a sweep (no {SPEC}): give another folder. Nothing was changed."
        )
    before = read_spec(folder)
    if differences := _differences(spec, before):
        raise ConfigError(
            f"{folder} holds another sweep: {', '.join(differences)}. Give the same file, perhaps with more seeds, "
            "values or samples, or another --out."
        )


def _holds(folder: str, names: Sequence[str]) -> str:
    """Return the error message for a folder in use."""
    if SPEC not in names:
        return f"{folder} is not empty ({', '.join(names[:4])}) and holds no sweep: choose another --out."
    known = summarize_sweep(folder)
    far = f" ({known['done']} of {known['trials']} trials done)" if {"done", "trials"} <= known.keys() else ""
    return (
        f"{folder} already holds the sweep {read_spec(folder).question!r}{far}. Continue with --resume, or choose "
        "another --out."
    )


def _differences(spec: SweepSpec, before: SweepSpec) -> list[str]:
    """Describe the differences that make `before` another experiment than `spec`."""
    found = [
        f"{key} was {getattr(before, key)!r} and is {getattr(spec, key)!r}"
        for key in ("base", "overrides", "photographs", "tour", "scheduler", "search")
        if getattr(before, key) != getattr(spec, key)
    ]
    if missing := [seed for seed in before.seeds if seed not in spec.seeds]:
        found.append(f"seeds was {list(before.seeds)} and leaves out {missing}")
    if list(spec.space) != list(before.space):
        return [*found, f"the space was over {', '.join(before.space)} and is over {', '.join(spec.space)}"]
    for key, axis in before.space.items():
        ((kind, values),) = axis.items()
        now = spec.space[key].get(kind)
        grown = now is not None and kind == "grid" and all(value in now for value in values)
        if now != values and not grown:
            found.append(f"{key} was {axis} and is {spec.space[key]}")
    if spec.num_samples < before.num_samples:
        found.append(f"num_samples was {before.num_samples} and is {spec.num_samples}")
    return found


def _largest(trials: Sequence[Trial]) -> Config:
    return max((trial.config for trial in trials), key=lambda config: Need.of(config).cpus)


def _cluster(trials: Sequence[Trial]) -> Config:
    """Return the configuration that a local cluster must fit: the largest trial and its driver."""
    config = _largest(trials)
    return load_config(
        config,
        f"cluster.num_workers={max(1, config.max_workers)}",
        f"cluster.decode_cpus={config.cluster.decode_cpus + DRIVER_CPUS}",
    )


def _progress(folder: str, spec: SweepSpec, base: Config, trials: Sequence[Trial]) -> SweepProgress:
    """Return the progress so far; remove the errors of failed trials, which will be retried."""
    known = [*known_trials(folder, spec, base, trials)]
    steps = {trial.name: trial.config.optim.steps for trial in trials}
    total = spec.count * base.optim.steps if spec.search == "tpe" else sum(steps.values())
    progress = SweepProgress(folder, spec.count, total, steps if spec.search == "all" else {})
    status = {trial.name: trial_status(folder, trial.name) for trial in known}
    progress.find(list(status), {name: found for name, found in status.items() if found in ("done", "stopped")})
    for name, found in status.items():
        if found == "failed":
            files.remove(error_file(folder, name))
            files.remove(files.join(trial_folder(folder, name), "report.html"))
    return progress


def known_trials(folder: str, spec: SweepSpec, base: Config, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of the sweep file, or with search=tpe those that Optuna has proposed so far."""
    if spec.search == "all":
        return list(trials)
    return [make_trial(base, values) for values in read_points(folder)]


def _write_pages(folder: str, rows: Sequence[Row]) -> None:
    """Write the tables and pages."""
    write_csv(files.join(folder, "results.csv"), rows)
    write_parquet(files.join(folder, "results.parquet"), rows)
    try:
        report(folder)
    except Exception as error:  # noqa: BLE001  a failing report must not end the sweep
        logger.warning("the report could not be written: %s", "".join(traceback.format_exception(error)))
