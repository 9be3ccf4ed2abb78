"""Baselines of a sweep: random encoders with the settings of its points, and chance."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from dora_ray import files
from dora_ray.checkpoints import resolve_checkpoint
from dora_ray.config import Config
from dora_ray.errors import DoRAError
from dora_ray.evaluation.features import find_splits
from dora_ray.evaluation.knn import most_frequent_share
from dora_ray.evaluation.options import TRACKING_OPTIONS
from dora_ray.training.measuring import KNN, OBJECTS, PROPAGATION, VIEWS, measure_teacher
from dora_ray.tuning.axes import SEED_KEY
from dora_ray.tuning.results import trial_folder
from dora_ray.tuning.space import Trial
from dora_ray.weights import random_backbone

logger = logging.getLogger(__name__)

BASELINE = "baseline.json"
RANDOM_SEEDS = (1, 2, 3, 4, 5, 6)
# Limits on test images and settings: more take minutes on the machine that launched the sweep.
MOST_IMAGES, MOST_SETTINGS = 5000, 12
OBJECT_METRICS = ("object_iou", "tracking_iou")
# The key of `evaluation` that names a task's data.
DATA = {KNN: "images", OBJECTS: "tour", PROPAGATION: "tour", VIEWS: "video"}
Facts = dict[str, Any]


def measure_baseline(folder: str, trials: Sequence[Trial]) -> None:
    """Write baseline.json: metric -> values of random encoders, chance, number of test images. Keep existing entries.

    Values under "random" hold for the whole sweep. If a value depends on what the sweep varies, as the IoU of k masks
    depends on k, it is under "points", with the settings of each point.

    Args:
        folder: the sweep's folder.
        trials: finished trials; their checkpoints define the architectures.
    """
    facts = read_baseline(folder)
    try:
        _add_knn(facts, trials)
        for tasks in ((KNN, PROPAGATION, VIEWS), (OBJECTS,)):
            _add_random(folder, facts, trials, tasks)
    except (DoRAError, OSError) as error:
        logger.warning("random encoders could not be evaluated: %s", error)
    if facts:
        files.write_text(files.join(folder, BASELINE), json.dumps(facts, indent=1) + "\n")


def _add_knn(facts: Facts, trials: Sequence[Trial]) -> None:
    images = {trial.config.evaluation.images: trial.config.evaluation.max_images for trial in trials}
    if "knn" in facts or len(images) != 1:
        return
    ((folder, most),) = images.items()
    if folder:
        test = find_splits(folder)[1].thinned(most)
        facts["knn"] = {"images": len(test.paths), "chance": most_frequent_share(test.labels)}


def _add_random(folder: str, facts: Facts, trials: Sequence[Trial], tasks: Sequence[str]) -> None:
    """Evaluate random encoders once for each setting that the tasks depend on."""
    if facts.get("knn", {}).get("images", 0) > MOST_IMAGES:
        tasks = [task for task in tasks if task != KNN]
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(_settings(trial.config, tasks), []).append(trial)
    if len(groups) > MOST_SETTINGS:
        logger.warning("random encoders are measured with %d of %d settings of masks", MOST_SETTINGS, len(groups))
    for members in list(groups.values())[:MOST_SETTINGS]:
        points = list({json.dumps(_point(trial)): _point(trial) for trial in members}.values())
        if len(groups) == 1 and not _has(facts, tasks, None):
            for metric, figures in _measure(folder, members[0], tasks).items():
                facts.setdefault(metric, {})["random"] = figures
        elif len(groups) > 1 and (new := [point for point in points if not _has(facts, tasks, point)]):
            for metric, figures in _measure(folder, members[0], tasks).items():
                facts.setdefault(metric, {}).pop("random", None)
                facts[metric].setdefault("points", []).extend({"values": point, "random": figures} for point in new)


def _settings(config: Config, tasks: Sequence[str]) -> str:
    """Return the settings that a random encoder's results depend on, as JSON."""
    parts = [config.model.model_dump_json(), config.crops.global_size, config.evaluation.model_dump_json()]
    if OBJECTS in tasks:
        parts.append(config.tracking.model_dump_json(include=set(TRACKING_OPTIONS)))
    return json.dumps(parts)


def _point(trial: Trial) -> dict[str, Any]:
    return {key: value for key, value in trial.values.items() if key != SEED_KEY}


def _has(facts: Facts, tasks: Sequence[str], point: dict[str, Any] | None) -> bool:
    """Return whether the baseline has values of these tasks, for a point or (None) for the whole sweep."""
    of_tasks = [fact for metric, fact in facts.items() if metric.startswith(OBJECT_METRICS) == (OBJECTS in tasks)]
    if point is None:
        return any("random" in fact for fact in of_tasks)
    return any(known["values"] == point for fact in of_tasks for known in fact.get("points", ()))


def _measure(folder: str, trial: Trial, tasks: Sequence[str]) -> dict[str, list[float]]:
    """Evaluate random encoders with a trial's settings; return metric -> values, one per seed."""
    tasks = [task for task in tasks if getattr(trial.config.evaluation, DATA[task])]
    if not tasks:
        return {}
    where = ", ".join(f"{key} {value}" for key, value in _point(trial).items())
    logger.info("measuring %d random encoders by %s, as the trials at %s", len(RANDOM_SEEDS), ", ".join(tasks), where)
    checkpoint = resolve_checkpoint(trial_folder(folder, trial.name))
    found = [
        measure_teacher(random_backbone(checkpoint, seed=seed), trial.config, device="cpu", tasks=tasks)[0]
        for seed in RANDOM_SEEDS
    ]
    return {metric: [values[metric] for values in found if metric in values] for metric in found[0]}


def read_baseline(folder: str) -> Facts:
    """Return the contents of baseline.json; empty if there is none."""
    path = files.join(folder, BASELINE)
    return dict(json.loads(files.read_text(path))) if files.exists(path) else {}
