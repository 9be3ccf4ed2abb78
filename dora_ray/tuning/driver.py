"""One trial inside Ray Tune: what its actor runs, and how Ray Tune hears of it.

Every line of the trial's metrics is a `tune.report`. A trial that is run again, after its driver was lost or in a
resumed sweep, first reports the lines that it has, so that Ray Tune's books are complete, and then goes on from its
run's checkpoint.
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
# In a report: this trial has failed for a reason that trying again does not change.
FAILED = "failed"
# Ray Tune gives the thread of a trial that has ended so long until it begins another one in the same process; the
# default of 2 s is too little on a machine that is shared, and the other trial would fail.
THREAD_SECONDS = 120


def trainable(folder: str) -> Callable[[dict[str, Any]], None]:
    """Return the function that Ray Tune runs for a sweep's trials.

    With it, Ray Tune's own advice can be followed: Tuner.restore("<sweep>/tune", trainable=trainable("<sweep>")).
    """
    return functools.partial(drive, folder=folder)


def drive(point: dict[str, Any], *, folder: str) -> None:
    """Run one trial of the sweep in a folder.

    Raises:
        Exception: what ended the trial; it is written down too. Ray's own errors and those of disks and networks are
            worth another try, and are not.
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
    """Draw one clip as the trial's teacher sees it, the same for all trials: the report puts them side by side."""
    pictures = files.join(run, "pictures")
    if files.is_remote(run) or files.exists(files.join(pictures, "clip-0.png")):
        return
    try:
        show(run, find_videos(trial.config.data.videos)[0], out=pictures, num_clips=1)
    except (DoRAError, OSError, RuntimeError) as error:
        logger.warning("the objects of %s are not drawn: %s", trial.name, error)


def _figures(line: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if name == "step" or name not in BOOKKEEPING}


def write_error(folder: str, name: str, error: BaseException) -> None:
    """Keep what ended a trial: its first line is the report's, the rest says where."""
    text = "".join(traceback.format_exception(error))
    files.write_text(error_file(folder, name), f"{type(error).__name__}: {error}\n\n{text}")
