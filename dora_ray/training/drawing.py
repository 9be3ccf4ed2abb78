"""Pictures of the objects that a run's teacher discovers, drawn a few times a run. Drawing only reads the state.

Shapes: M clips a slot, T frames, H x W pixels, K objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from dora_ray.clips.slot import SlotBatch
from dora_ray.config import Config

if TYPE_CHECKING:
    from PIL.Image import Image
    from timm.models.vision_transformer import VisionTransformer


def picture_steps(config: Config) -> frozenset[int]:
    """Return the steps after which to draw a picture: evenly spaced from first to last, or the last alone."""
    num_pictures, num_steps = min(config.run.pictures, config.optim.steps), config.optim.steps
    if num_pictures == 1:
        return frozenset({num_steps})
    return frozenset(1 + i * (num_steps - 1) // (num_pictures - 1) for i in range(num_pictures))


class ObjectPictures:
    """Draws the same clip each time, so that an attempt's pictures can be compared.

    It draws no random numbers and changes no training state: the weights are bit-identical with and without it.

    Args:
        config: the run's.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._due = picture_steps(config)
        self._clip: NDArray[np.uint8] | None = None

    def is_due(self, step: int) -> bool:
        """Return whether to draw a picture after this step."""
        return step in self._due

    def draw(self, teacher: VisionTransformer, batches: Sequence[SlotBatch], step: int) -> Image | None:
        """Draw the objects of the attempt's clip.

        Args:
            teacher: the current teacher encoder.
            batches: this step's slots; the attempt's first picture takes its clip from them.
            step: steps done.

        Returns:
            The picture; None if no clip could be read yet, or if a map is not finite (the next step reports that).
        """
        if self._clip is None:
            self._clip = next((b.clips[i].copy() for b in batches for i in np.flatnonzero(b.valid)), None)
        return None if self._clip is None else _draw(teacher, self._clip, self._config, step)


def _draw(teacher: VisionTransformer, clip: NDArray[np.uint8], config: Config, step: int) -> Image | None:
    """Draw the objects of a clip (T, H, W, 3), discovered by the first K heads; None if a map is not finite."""
    from dora_ray.evaluation.pictures import figure, track, tracking_arguments
    from dora_ray.evaluation.shots import Shot

    model, tracking, num_frames = config.model, config.tracking, len(clip)
    with _uncompiled(config):
        tracks = track(
            teacher,
            clip,
            np.arange(min(tracking.num_objects, model.num_heads)),
            image_size=config.crops.global_size,
            device=str(next(teacher.parameters()).device),
            **tracking_arguments(tracking.model_dump()),
        )
    if not all(np.isfinite(part).all() for part in (tracks.attention, tracks.maps, tracks.masks)):
        return None
    shot = Shot(clip, np.arange(num_frames) * config.clip.stride_seconds, np.zeros(num_frames, np.bool_))
    heading = [
        f"Step {step} of {config.optim.steps}: objects found in a clip's first frame and tracked",
        f"teacher ({model.name}, {model.width} wide, {model.depth} deep); block {tracking.block}, "
        f"{tracking.num_iterations} Sinkhorn-Knopp iterations, masks: {tracking.threshold}",
    ]
    return figure(shot, tracks, np.arange(num_frames), heading=heading)


def _uncompiled(config: Config) -> AbstractContextManager[object]:
    """Run eagerly: compiling kernels for one picture would take longer than drawing it."""
    return torch.compiler.set_stance("force_eager") if config.optim.compile else nullcontext()
