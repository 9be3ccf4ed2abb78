"""Evaluate a run's teacher during training: kNN, object discovery and tracking, label propagation, view matching."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from dora_ray import files
from dora_ray.config import Config
from dora_ray.errors import ConfigError, VideoError
from dora_ray.evaluation.features import find_splits, training_size
from dora_ray.evaluation.knn import evaluate_knn
from dora_ray.evaluation.labeled_clips import davis_folder, find_clips
from dora_ray.evaluation.objects import evaluate_objects
from dora_ray.evaluation.options import TRACKING_OPTIONS, KnnOptions, ObjectsOptions, Options, ViewsOptions, VosOptions
from dora_ray.evaluation.views import evaluate_views, find_film
from dora_ray.evaluation.vos import evaluate_vos

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

NOT_OF_THE_TASK = {"random_init", "seed", "random_encoders"}
# Frames from the start of each sequence: enough to lose an object, and few enough to evaluate during training.
PROPAGATED_FRAMES = 6
KNN, OBJECTS, PROPAGATION, VIEWS = "kNN", "objects", "label propagation", "view matching"
TASKS = (KNN, OBJECTS, PROPAGATION, VIEWS)
Values = dict[str, float]


def is_due(config: Config, step: int) -> bool:
    """Return whether the run evaluates its teacher after this step."""
    evaluation = config.evaluation
    if not (evaluation.images or evaluation.tour or evaluation.video):
        return False
    return step == config.optim.steps or (evaluation.every_steps > 0 and step % evaluation.every_steps == 0)


def prepare(config: Config) -> Config:
    """Return the configuration with absolute paths to its evaluation data, valid on every worker.

    Raises:
        ConfigError: the data is missing, or has another layout.
        VideoError: the video is missing.
    """
    evaluation = config.evaluation
    paths: dict[str, str] = {}
    if evaluation.images is not None:
        paths["images"] = files.absolute(evaluation.images)
        find_splits(paths["images"])
    if evaluation.tour is not None:
        paths["tour"] = files.absolute(evaluation.tour)
        find_clips(paths["tour"], num_frames=evaluation.tour_frames, stride=1, max_clips=1)
    if evaluation.video is not None:
        paths["video"] = find_film(evaluation.video)
    return config.model_copy(update={"evaluation": evaluation.model_copy(update=paths)}) if paths else config


def measure_teacher(
    backbone: VisionTransformer, config: Config, *, device: str, tasks: Collection[str] = TASKS
) -> tuple[Values, list[str]]:
    """Evaluate the teacher's encoder in its current state, by some or all of TASKS.

    Unreadable data, or a lack of memory, must not end one rank of a training: the problem is returned, not raised.

    Returns:
        Values: knn; object_iou and tracking_iou with chance levels; j_and_f of label propagation; view_matching, its
        two halves and rankme; each only if the configuration names its data. Problems: a sentence for each task that
        could not be evaluated.
    """
    evaluation = config.evaluation
    known: tuple[tuple[str, str | None, Callable[..., Values]], ...] = (
        (KNN, evaluation.images, _knn),
        (OBJECTS, evaluation.tour, _objects),
        (PROPAGATION, evaluation.tour, _propagation),
        (VIEWS, evaluation.video, _views),
    )
    values: Values = {}
    problems: list[str] = []
    for name, data, measure in known:
        if data is None or name not in tasks:
            continue
        try:
            values |= measure(backbone, config, data, device)
        except (ConfigError, VideoError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            problems.append(f"no {name}: {str(error).partition(chr(10))[0] or 'out of memory'}")
    return values, problems


def _knn(backbone: VisionTransformer, config: Config, data: str, device: str) -> Values:
    options = KnnOptions(image_size=training_size(backbone), max_images=config.evaluation.max_images, device=device)
    return {"knn": float(evaluate_knn(backbone, data, **_arguments(options))["top1"])}


def _objects(backbone: VisionTransformer, config: Config, data: str, device: str) -> Values:
    tracking = config.tracking.model_dump(include=set(TRACKING_OPTIONS))
    options = ObjectsOptions(
        image_size=config.evaluation.tour_short_side or training_size(backbone),
        num_frames=config.evaluation.tour_frames,
        max_clips=config.evaluation.max_clips,
        device=device,
    )
    return _numbers(evaluate_objects(backbone, data, **(_arguments(options) | tracking)))


def _propagation(backbone: VisionTransformer, config: Config, data: str, device: str) -> Values:
    options = VosOptions(
        short_side=config.evaluation.tour_short_side or training_size(backbone),
        max_frames=PROPAGATED_FRAMES,
        device=device,
    )
    return {"j_and_f": float(evaluate_vos(backbone, davis_folder(data), **_arguments(options))["j_and_f"])}


def _views(backbone: VisionTransformer, config: Config, data: str, device: str) -> Values:
    options = ViewsOptions(image_size=training_size(backbone), num_scenes=config.evaluation.max_clips, device=device)
    return _numbers(evaluate_views(backbone, data, **_arguments(options)))


def _arguments(options: Options) -> dict[str, Any]:
    return options.model_dump(exclude=NOT_OF_THE_TASK)


def _numbers(results: dict[str, Any]) -> Values:
    """Keep the measures; drop counts and samples."""
    return {name: value for name, value in results.items() if isinstance(value, float) and name != "chance"}
