"""Run a sweep's trials with Ray Tune: parameter space, search algorithm, scheduler."""

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

# ASHA first compares trials after this share of their steps, when warm-up is over.
GRACE_SHARE = 0.25
OnProgress = Callable[[SweepProgress], None]


def _distinct_clusters(trials: Sequence[Trial]) -> list[Trial]:
    """Return one trial for each distinct cluster configuration."""
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
    """Run the trials with Ray Tune; their folders hold the results afterwards.

    Args:
        folder: the sweep's folder.
        spec: the sweep's file.
        base: configuration that all trials start from.
        trials: all trials of the sweep, finished ones included; with search=tpe a sample of them.
        progress: updated while trials run.
        write_pages: called now and then when a trial ends.
        on_progress: called with every update.
    """
    # Ray Tune's new output prints a box to stdout regardless of `verbose`, but stdout is for results. Strict metric
    # checking is off because an accuracy is not in every line of metrics. On a busy machine a slow loop is normal, so
    # its warning threshold is raised.
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
    # Discard Ray Tune's state of an earlier attempt: all trials report again.
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
            # Importing torch in a new process costs seconds of a core, and a trial may take only half a minute. After
            # an early stop the old trial still runs in the process, so it cannot be reused.
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
    """Call `run`; repeat it, at most `most` times, if Ray kills a trial's process because its node is out of memory.

    Ray Tune retries a trial whose process died, but treats this error as its own and ends the sweep.
    """
    from ray.exceptions import OutOfMemoryError

    for left in range(most, -1, -1):
        try:
            run()
        except Exception as error:
            if not left or not any(isinstance(cause, OutOfMemoryError) for cause in _causes(error)):
                raise
            logger.warning(
                "Ray killed a trial's process because its node was out of memory; the missing trials run again. Set "
                "max_concurrent_trials in the sweep file to run fewer at a time"
            )
        else:
            return


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _param_space(spec: SweepSpec, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return Ray Tune's parameter space: one grid of complete trials, or for Optuna the space itself."""
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
    """Return Ray Tune's search algorithm; `Watch` updates its `max_concurrent` as the cluster grows or shrinks."""
    if spec.search == "all":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(max_concurrent=1)
    from ray.tune.search import ConcurrencyLimiter, Repeater
    from ray.tune.search.optuna import OptunaSearch

    points = [{key: value for key, value in values.items() if key != SEED_KEY} for values in read_points(folder)]
    before = list({json.dumps(point): point for point in points}.values())
    try:
        # Given points consume no random numbers: with a fixed seed the first new point would repeat the very first one.
        seed = len(before)
        optuna = OptunaSearch(metric=spec.metric, mode=spec.mode, points_to_evaluate=before or None, seed=seed)
    except AssertionError as error:
        raise ConfigError(f"search=tpe needs the extra optuna: pip install 'dora-ray[optuna]' ({error})") from error
    return ConcurrencyLimiter(Repeater(optuna, repeat=len(spec.seeds)), max_concurrent=1)


def _folder_of_tune(trial: Any) -> str:
    """Return a trial's name and folder for Ray Tune: just its id, as the values are in its configuration."""
    return str(trial.trial_id)


def _scheduler(spec: SweepSpec, base: Config) -> Any:
    if spec.scheduler == "none":
        return None
    from ray.tune.schedulers import AsyncHyperBandScheduler

    steps = base.optim.steps
    return AsyncHyperBandScheduler(
        time_attr="step", max_t=steps + 1, grace_period=max(1, round(GRACE_SHARE * steps)), reduction_factor=2
    )
