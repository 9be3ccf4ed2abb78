"""The sweep's trials as Ray Tune sees them: param space, search, scheduler, and its own folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dora_ray import files
from dora_ray.config import Config
from dora_ray.errors import ConfigError
from dora_ray.training.trainer import on_devices
from dora_ray.tuning.axes import SEED_KEY
from dora_ray.tuning.capacity import Capacity, largest
from dora_ray.tuning.driver import trainable
from dora_ray.tuning.progress import SweepProgress, read_points
from dora_ray.tuning.space import SweepSpec, Trial

logger = logging.getLogger(__name__)

# ASHA compares trials first after this share of their steps; earlier, warm-up is all there is to see.
GRACE_SHARE = 0.25
OnProgress = Callable[[SweepProgress], None]


def _distinct_clusters(trials: Sequence[Trial]) -> list[Trial]:
    """One trial for each way in which they ask for resources."""
    return list({trial.config.cluster.model_dump_json(): trial for trial in trials}.values())


def run_trials(
    folder: str,
    spec: SweepSpec,
    base: Config,
    trials: Sequence[Trial],
    progress: SweepProgress,
    write_pages: Callable[[], object],
    *,
    on_progress: OnProgress | None,
) -> None:
    """Let Ray Tune run the trials; how they ended is in their folders afterwards.

    Args:
        folder: the sweep's.
        spec: the sweep's.
        base: configuration that all trials start from.
        trials: of the sweep, those that have ended too; with search=tpe a sample of them.
        progress: kept up to date.
        write_pages: called now and then, at trials' ends.
        on_progress: called with every news.
    """
    # Ray Tune's newer output prints a box to standard output whatever `verbose` says; results alone belong there. An
    # accuracy is not in every line of metrics. That its loop was slow for a second on a busy machine is no news.
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_THRESHOLD_S": "60",
    }
    from ray import tune

    from dora_ray.tuning.watch import Watch

    need = largest([on_devices(trial.config) for trial in _distinct_clusters(trials)])
    capacity = Capacity(need, spec.max_concurrent_trials or progress.trials)
    search = _search(folder, spec)
    watch = Watch(
        folder,
        spec,
        search=search,
        capacity=capacity,
        progress=progress,
        write_pages=write_pages,
        on_progress=on_progress,
    )
    # An older attempt's books are replaced: all trials report again.
    files.remove(files.join(folder, "tune"))
    tuner = tune.Tuner(
        tune.with_resources(trainable(folder), need.driver),
        param_space=_param_space(spec, trials),
        tune_config=tune.TuneConfig(
            metric=spec.metric,
            mode=spec.mode,
            search_alg=search,
            scheduler=_scheduler(spec, base),
            num_samples=spec.count if spec.search == "tpe" else 1,
            # A process that imports torch anew takes seconds of a core, for a trial that may take half a minute. One
            # whose trial was stopped early is not done with it.
            reuse_actors=spec.scheduler == "none",
            trial_name_creator=_folder_of_tune,
            trial_dirname_creator=_folder_of_tune,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=base.cluster.max_failures),
        ),
    )
    try:
        tuner.fit()
    finally:
        capacity.close()


def run_through_lost_memory(run: Callable[[], None], most: int) -> None:
    """Call `run`, and again where Ray has ended a trial's process for its node's memory, at most so often.

    Ray Tune tries a trial again whose process has died, but takes that error for one of its own and ends the sweep.
    """
    from ray.exceptions import OutOfMemoryError

    for left in range(most, -1, -1):
        try:
            run()
        except Exception as error:
            if not left or not any(isinstance(cause, OutOfMemoryError) for cause in _causes(error)):
                raise
            logger.warning(
                "a trial's process was ended, since its node had no memory left; the trials that are missing are run "
                "again. max_concurrent_trials in the sweep's file runs fewer at a time"
            )
        else:
            return


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _param_space(spec: SweepSpec, trials: Sequence[Trial]) -> dict[str, Any]:
    """Dotted keys and values: a point a trial, which keeps what belongs together; for Optuna the space itself."""
    from ray import tune

    if spec.search == "all":
        points: dict[str, Any] = tune.grid_search([trial.values for trial in trials])
        return points
    kinds = {"grid": tune.choice, "choice": tune.choice}
    intervals = {"uniform": tune.uniform, "loguniform": tune.loguniform}
    space = {}
    for key, axis in spec.space.items():
        ((kind, values),) = axis.items()
        space[key] = kinds[kind](values) if kind in kinds else intervals[kind](*values)
    return space


def _search(folder: str, spec: SweepSpec) -> Any:
    """Ray Tune's search algorithm; its `max_concurrent` is set anew as the cluster grows or shrinks."""
    if spec.search == "all":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(max_concurrent=1)
    from ray.tune.search import ConcurrencyLimiter, Repeater
    from ray.tune.search.optuna import OptunaSearch

    points = [{key: value for key, value in values.items() if key != SEED_KEY} for values in read_points(folder)]
    before = list({json.dumps(point): point for point in points}.values())
    try:
        # Points that are given draw no numbers: with the same seed the first new one would be the first of all again.
        seed = len(before)
        optuna = OptunaSearch(metric=spec.metric, mode=spec.mode, points_to_evaluate=before or None, seed=seed)
    except AssertionError as error:
        raise ConfigError(f"search=tpe needs the extra optuna: pip install 'dora-ray[optuna]' ({error})") from error
    return ConcurrencyLimiter(Repeater(optuna, repeat=len(spec.seeds)), max_concurrent=1)


def _folder_of_tune(trial: Any) -> str:
    """A trial's name and folder in Ray Tune's books: its values are in its configuration."""
    return str(trial.trial_id)


def _scheduler(spec: SweepSpec, base: Config) -> Any:
    if spec.scheduler == "none":
        return None
    from ray.tune.schedulers import AsyncHyperBandScheduler

    steps = base.optim.steps
    return AsyncHyperBandScheduler(
        time_attr="step", max_t=steps + 1, grace_period=max(1, round(GRACE_SHARE * steps)), reduction_factor=2
    )
