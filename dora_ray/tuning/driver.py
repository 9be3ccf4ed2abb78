"""One trial inside Ray Tune: the function that its actor runs, and its reports.

Every line of the trial's metrics becomes a `tune.report`. A trial that runs again (its driver was lost, or the sweep
was resumed) first reports its existing lines, so that Ray Tune's results are complete, then resumes from its run's
checkpoint.
"""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from dora_ray import files
from dora_ray.config import load_config
from dora_ray.config_source import parse_yaml
from dora_ray.errors import DoRAError
from dora_ray.evaluation.pictures import show
from dora_ray.training.launch import train
from dora_ray.training.records.journal import read_metrics
from dora_ray.tuning.results import BOOKKEEPING, error_file, read_spec, trial_folder, trial_status
from dora_ray.tuning.space import Trial, make_trial, with_seed
from dora_ray.video.sources import find_videos

logger = logging.getLogger(__name__)

SPEC, BASE = "sweep.yaml", "base.yaml"
# Key of a report: the trial has failed, and a retry would not help.
FAILED = "failed"
# Time that Ray Tune waits for a finished trial's thread before it starts another trial in the same process. Its default
# of 2 s is too short on a shared machine: the next trial would fail.
THREAD_SECONDS = 120


def trainable(folder: str) -> Callable[[dict[str, Any]], None]:
    """Return the function that Ray Tune runs for a sweep's trials.

    It also restores Ray Tune's own folder: Tuner.restore("<sweep>/tune", trainable=trainable("<sweep>")).
    """
    return functools.partial(drive, folder=folder)


def drive(point: dict[str, Any], *, folder: str) -> None:
    """Run one trial of the sweep in a folder.

    Raises:
        Exception: the error that ended the trial, which is also written to its error file. Ray errors and OSErrors are
            worth a retry and are not written.
    """
    from ray import tune
    from ray.exceptions import RayError

    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(THREAD_SECONDS))
    spec = read_spec(folder)
    base = load_config(parse_yaml(files.read_text(files.join(folder, BASE)), BASE))
    trial = make_trial(base, with_seed(point, spec))
    run = trial_folder(folder, trial.name)
    for line in read_metrics(run):
        tune.report(_figures(line))
    if trial_status(folder, trial.name) in ("done", "stopped"):
        return
    try:
        train(trial.config, out=run, resume=True, progress=False, on_metrics=lambda line: tune.report(_figures(line)))
    except (RayError, OSError):
        raise
    except Exception as error:
        write_error(folder, trial.name, error)
        tune.report({FAILED: 1})
        raise
    _draw_objects(trial, run)


def _draw_objects(trial: Trial, run: str) -> None:
    """Draw the teacher's objects in one clip, the same for all trials: the report shows them side by side."""
    pictures = files.join(run, "pictures")
    if files.is_remote(run) or files.exists(files.join(pictures, "clip-0.png")):
        return
    try:
        show(run, find_videos(trial.config.data.videos)[0], out=pictures, num_clips=1)
    except (DoRAError, OSError, RuntimeError) as error:
        logger.warning("the objects of %s could not be drawn: %s", trial.name, error)


def _figures(line: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if name == "step" or name not in BOOKKEEPING}


def write_error(folder: str, name: str, error: BaseException) -> None:
    """Write the error that ended a trial: first the line that the report shows, then the traceback."""
    text = "".join(traceback.format_exception(error))
    files.write_text(error_file(folder, name), f"{type(error).__name__}: {error}\n\n{text}")
