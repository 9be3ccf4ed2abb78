"""Pictures of what a run's teacher takes for objects, a few times a run: they read the training state, and no more.

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
    """Return the steps after which a picture is due: evenly spaced from the first to the last, or the last alone."""
    num_pictures, num_steps = min(config.run.pictures, config.optim.steps), config.optim.steps
    if num_pictures == 1:
        return frozenset({num_steps})
    return frozenset(1 + i * (num_steps - 1) // (num_pictures - 1) for i in range(num_pictures))


class ObjectPictures:
    """Draws one clip again and again, so that an attempt's pictures can be compared.

    Nothing random is drawn and nothing of the training is written to: weights are the same bits with and without.

    Args:
        config: the run's.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._due = picture_steps(config)
        self._clip: NDArray[np.uint8] | None = None

    def is_due(self, step: int) -> bool:
        """Tell whether a picture is to be drawn after that step."""
        return step in self._due

    def draw(self, teacher: VisionTransformer, batches: Sequence[SlotBatch], step: int) -> Image | None:
        """Draw the objects of the attempt's clip.

        Args:
            teacher: the encoder as it is now.
            batches: slots at hand; the attempt's first picture takes its clip from them.
            step: steps done.

        Returns:
            None where no clip could be read so far, or the teacher's numbers are not finite: the next step names them.
        """
        if self._clip is None:
            self._clip = next((b.clips[i].copy() for b in batches for i in np.flatnonzero(b.valid)), None)
        return None if self._clip is None else _draw(teacher, self._clip, self._config, step)


def _draw(teacher: VisionTransformer, clip: NDArray[np.uint8], config: Config, step: int) -> Image | None:
    """Draw the objects of a clip (T, H, W, 3): the first K heads discover them. None where a map is not finite."""
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
    """Keep torch.compile from making kernels for a picture, which would take longer than the picture."""
    return torch.compiler.set_stance("force_eager") if config.optim.compile else nullcontext()
