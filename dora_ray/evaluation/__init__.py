"""Evaluation of a checkpoint's encoder: one function for all protocols.

Each protocol has its own module, listed in `tasks`. Torch is imported only when an encoder is evaluated.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dora_ray import files
from dora_ray.errors import ConfigError
from dora_ray.evaluation.options import TRACKING_OPTIONS, ObjectsOptions, Options, parse_options
from dora_ray.evaluation.tasks import NOT_OF_THE_TASK, TASKS, Task
from dora_ray.progress import Progress

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["TASKS", "evaluate"]


def evaluate(
    checkpoint: str | os.PathLike[str],
    task: str,
    *,
    data: str | os.PathLike[str],
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint's frozen teacher.

    Args:
        checkpoint: A checkpoint, a run's folder (its newest checkpoint), an exported encoder, a file of weights (.pth)
            or a URI of one of them; or timm:NAME.
        task: "knn", "linear", "corloc", "vos", "objects" or "views".
        data: The data's folder: train/CLASS/* and test/CLASS/* for knn and linear, images and boxes for corloc (Pascal
            VOC's layout, or images/ and boxes.json), DAVIS's layout for vos, DAVIS 2017's or a labeled tour for
            objects, any video, labeled tour or folder of frames for views.
        progress: Show progress: a bar on a terminal, else lines in the log.
        **options: The task's settings; `dora_ray.evaluation.options` lists them with their defaults.

    Returns:
        JSON-serializable: task, checkpoint, encoder (description of its architecture), data, settings (all options as
        used) and results (shares in [0, 1]). For a run's checkpoint it is also added to the run's evaluations.jsonl.

    Raises:
        ConfigError: An unknown task or option, or data in another layout.
        CheckpointError: The checkpoint is missing, incomplete, damaged or of another architecture.
    """
    from dora_ray.checkpoints import resolve_checkpoint
    from dora_ray.evaluation.kept import keep
    from dora_ray.timm_folder import describe
    from dora_ray.weights import load_backbone, random_backbone

    if task not in TASKS:
        raise ConfigError(f"Unknown evaluation {task!r}; choose from {', '.join(TASKS)}.")
    parsed = parse_options(TASKS[task].options, task, options)
    source = resolve_checkpoint(checkpoint)
    device = check_device(parsed.device)
    backbone = random_backbone(source, seed=parsed.seed) if parsed.random_init else load_backbone(source)
    settings = _complete(parsed, source, backbone)
    title = f"eval {task}, random encoder" if parsed.random_init else f"eval {task}"
    run = functools.partial(_run, TASKS[task], data=data, settings=settings, progress=progress)
    results = run(backbone.to(device), title=title)
    if TASKS[task].beside:
        results = _beside(run, source, settings, results)
    evaluation = {
        "task": task,
        "checkpoint": source,
        "encoder": describe(backbone),
        "data": files.absolute(data),
        "settings": parsed.model_copy(update=settings).model_dump(mode="json"),
        "results": results,
    }
    keep(evaluation)
    return evaluation


def _complete(parsed: Options, source: str, backbone: VisionTransformer) -> dict[str, Any]:
    """Return all options; unset ones take the encoder's own values."""
    from dora_ray.weights import read_origin

    settings = parsed.model_dump()
    if "image_size" in settings:
        settings["image_size"] = _image_size(backbone, settings["image_size"])
    if isinstance(parsed, ObjectsOptions):
        known = read_origin(source, backbone).config["tracking"]
        settings |= {name: known[name] for name in TRACKING_OPTIONS if settings[name] is None}
    return settings


def _run(
    task: Task,
    backbone: VisionTransformer,
    *,
    data: str | os.PathLike[str],
    settings: dict[str, Any],
    progress: bool,
    title: str,
) -> dict[str, Any]:
    """Run a task and show its progress."""
    accepted = {name: value for name, value in settings.items() if name not in NOT_OF_THE_TASK}
    if not progress:
        return task.run(backbone, data, progress=None, **accepted)
    with Progress(title, unit=task.unit) as bar:

        def update(done: int, total: int) -> None:
            bar.update(step=done, total=total)

        return task.run(backbone, data, progress=update, **accepted)


def _beside(
    run: Callable[..., dict[str, Any]], source: str, settings: dict[str, Any], results: dict[str, Any]
) -> dict[str, Any]:
    """Add the results of random encoders to those of a trained one."""
    from dora_ray.evaluation.beside import beside_random
    from dora_ray.weights import random_backbone

    seeds = () if settings["random_init"] else range(settings["seed"], settings["seed"] + settings["random_encoders"])
    others = (random_backbone(source, seed=seed).to(settings["device"]) for seed in seeds)
    found = [run(other, title="random encoder") for other in others]
    return beside_random(results, found)


def _image_size(backbone: VisionTransformer, asked: int | None) -> int:
    """Return the encoder's input size in pixels.

    Raises:
        ConfigError: The size is not a multiple of the encoder's patch size.
    """
    from dora_ray.evaluation.features import training_size

    size, patch = asked or training_size(backbone), int(backbone.patch_embed.patch_size[0])
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(f"image_size={size} is not a multiple of the encoder's patch size of {patch} px; use {near}.")
    return size


def check_device(name: str) -> torch.device:
    """Return the device with this name.

    Raises:
        ConfigError: The device does not exist on this machine.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device={name!r} is not available ({str(error).splitlines()[0]}). Use cpu.") from error
    return device
