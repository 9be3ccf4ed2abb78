"""How good is a checkpoint's encoder? One function for every protocol; each protocol has its own file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from dora_ray import files
from dora_ray.checkpoints import resolve_checkpoint
from dora_ray.errors import ConfigError
from dora_ray.evaluation.beside import beside_random
from dora_ray.evaluation.corloc import evaluate_corloc
from dora_ray.evaluation.features import training_size
from dora_ray.evaluation.knn import evaluate_knn
from dora_ray.evaluation.linear import evaluate_linear
from dora_ray.evaluation.objects import evaluate_objects
from dora_ray.evaluation.options import (
    TRACKING_OPTIONS,
    BesideOptions,
    CorlocOptions,
    KnnOptions,
    LinearOptions,
    ObjectsOptions,
    OptionsType,
    ViewsOptions,
    VosOptions,
    parse_options,
)
from dora_ray.evaluation.views import evaluate_views
from dora_ray.evaluation.vos import evaluate_vos
from dora_ray.weights import load_backbone, random_backbone, read_origin

__all__ = ["TASKS", "evaluate"]

TASKS: dict[str, tuple[OptionsType, Callable[..., dict[str, Any]]]] = {
    "knn": (KnnOptions, evaluate_knn),
    "linear": (LinearOptions, evaluate_linear),
    "corloc": (CorlocOptions, evaluate_corloc),
    "vos": (VosOptions, evaluate_vos),
    "objects": (ObjectsOptions, evaluate_objects),
    "views": (ViewsOptions, evaluate_views),
}

NOT_OF_THE_TASK = ("random_init", "seed", "random_encoders")


def evaluate(
    checkpoint: str | os.PathLike[str], task: str, *, data: str | os.PathLike[str], **options: Any
) -> dict[str, Any]:
    """Evaluate a checkpoint's teacher, frozen.

    Args:
        checkpoint: A checkpoint, a run's folder (its newest checkpoint), an exported encoder, a file of weights (.pth)
            or a URI of one of them; or timm:NAME.
        task: "knn", "linear", "corloc", "vos", "objects" or "views".
        data: The data's folder: train/CLASS/* and test/CLASS/* for knn and linear, images and boxes for corloc (Pascal
            VOC's layout, or images/ and boxes.json), DAVIS's layout for vos, DAVIS 2017's or a labeled tour for
            objects, any video, labeled tour or folder of frames for views.
        **options: The task's settings; `dora_ray.evaluation.options` lists them with their defaults.

    Returns:
        task, checkpoint, data, settings (all options as used) and results (shares in [0, 1]); ready for JSON.

    Raises:
        ConfigError: An unknown task or option, or data in another layout.
        CheckpointError: The checkpoint is missing, incomplete, damaged or of another architecture.
    """
    if task not in TASKS:
        raise ConfigError(f"Unknown evaluation {task!r}; choose from {', '.join(TASKS)}.")
    kind, run = TASKS[task]
    parsed = parse_options(kind, task, options)
    folder = resolve_checkpoint(checkpoint)
    device = check_device(parsed.device)
    backbone = random_backbone(folder, seed=parsed.seed) if parsed.random_init else load_backbone(folder)
    settings = parsed.model_dump()
    if "image_size" in settings:
        settings["image_size"] = settings["image_size"] or training_size(backbone)
    if isinstance(parsed, ObjectsOptions):
        known = read_origin(folder, backbone).config["tracking"]
        settings |= {name: known[name] for name in TRACKING_OPTIONS if settings[name] is None}
    accepted = {name: value for name, value in settings.items() if name not in NOT_OF_THE_TASK}
    results = run(backbone.to(device), data, **accepted)
    if isinstance(parsed, BesideOptions):
        seeds = () if parsed.random_init else range(parsed.seed, parsed.seed + parsed.random_encoders)
        others = (random_backbone(folder, seed=seed).to(device) for seed in seeds)
        results = beside_random(results, [run(other, data, **accepted) for other in others])
    return {
        "task": task,
        "checkpoint": folder,
        "data": files.absolute(data),
        "settings": parsed.model_copy(update=settings).model_dump(mode="json"),
        "results": results,
    }


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: No device has that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device={name!r} cannot be used here ({str(error).splitlines()[0]}). Use cpu.") from error
    return device
