"""Baselines of a sweep's figures: random encoders of the same architecture, and chance."""

from __future__ import annotations

import json
import logging
from typing import Any

from dora_ray import files
from dora_ray.checkpoints import resolve_checkpoint
from dora_ray.config import Config
from dora_ray.errors import DoRAError
from dora_ray.evaluation.features import find_splits
from dora_ray.evaluation.knn import most_frequent_share
from dora_ray.training.measuring import measure_teacher
from dora_ray.weights import random_backbone

logger = logging.getLogger(__name__)

BASELINE = "baseline.json"
RANDOM_SEEDS = (1, 2, 3, 4, 5, 6)
# More test images than that take minutes on the machine that only waits for the trials.
MOST_IMAGES = 5000


def measure_baseline(folder: str, run: str, config: Config) -> None:
    """Write baseline.json, unless it is there: metric -> figures of random encoders, of chance, and test images.

    Args:
        folder: the sweep's.
        run: a finished trial's, for its architecture.
        config: of that trial.
    """
    path = files.join(folder, BASELINE)
    if files.exists(path):
        return
    logger.info("measuring %d random encoders, which the trials are compared with", len(RANDOM_SEEDS))
    try:
        facts = _measure(run, config)
    except (DoRAError, OSError) as error:
        logger.warning("random encoders cannot be measured: %s", error)
        return
    files.write_text(path, json.dumps(facts, indent=1) + "\n")


def _measure(run: str, config: Config) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    images = config.evaluation.images
    if images:
        test = find_splits(images)[1].thinned(config.evaluation.max_images)
        facts["knn"] = {"images": len(test.paths), "chance": most_frequent_share(test.labels)}
        if len(test.paths) > MOST_IMAGES:
            return facts
    checkpoint = resolve_checkpoint(run)
    found = [measure_teacher(random_backbone(checkpoint, seed=seed), config, device="cpu")[0] for seed in RANDOM_SEEDS]
    for metric in found[0] if found else ():
        facts.setdefault(metric, {})["random"] = [values[metric] for values in found if metric in values]
    return facts


def read_baseline(folder: str) -> dict[str, Any]:
    """Return what `measure_baseline` has written; nothing before that."""
    path = files.join(folder, BASELINE)
    return dict(json.loads(files.read_text(path))) if files.exists(path) else {}
