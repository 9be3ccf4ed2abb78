"""Random draws of a slot: views, attention heads, noise for random masks; and its tensors on the device.

Shapes: M clips a slot, T frames, G global and L local views, K objects, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_ray.clips.plan import Purpose, slot_generator, slot_seed
from dora_ray.config import Config, CropsConfig
from dora_ray.method.parts import part
from dora_ray.method.upload import upload
from dora_ray.views.augment import ViewParameters, draw_views, render, upload_clips


def object_weight(config: Config, step: int) -> float:
    """Return the weight of the object term of the loss; its mean over `tracking.every_steps` steps is 1."""
    every = config.tracking.every_steps
    return float(every) if step % every == 0 else 0.0


@dataclass(frozen=True)
class SlotDraws:
    """All random draws of a slot except its clips, made on the CPU before the forward.

    Attributes:
        global_views: parameters of the G global views.
        local_views: parameters of the L local views.
        heads: (M, K) int64, distinct attention heads for each clip.
        noise: (M, K, T, N) in [0, 1), for random masks; None otherwise.
        network_seed: seed for the layers that draw random numbers (drop path).
        object_weight: see `object_weight`; not random, but also a function of the step.
    """

    global_views: ViewParameters
    local_views: ViewParameters
    heads: Tensor
    noise: Tensor | None
    network_seed: int
    object_weight: float


def draw_slot(config: Config, step: int, slot: int) -> SlotDraws:
    """Return the draws of one slot, a pure function of (seed, step, slot)."""
    crops, tracking, num_clips = config.crops, config.tracking, config.optim.clips_per_slot

    def generator(purpose: Purpose) -> np.random.Generator:
        return slot_generator(config.run.seed, step, slot, purpose)

    shared: dict[str, Any] = {
        "num_clips": num_clips,
        "num_frames": config.clip.num_frames,
        "clip_size": crops.clip_size,
        "ratio": crops.aspect_ratio,
        "jitter": crops.jitter,
        "jitter_probability": crops.jitter_probability,
        "gray_probability": crops.gray_probability,
        "blur_sigma": crops.blur_sigma,
    }
    global_views = draw_views(
        generator(Purpose.GLOBAL_VIEWS),
        num_views=config.num_globals,
        scale=crops.global_scale,
        per_frame_boxes=False,
        flip_probability=crops.flip_probability,
        blur_probability=crops.global_blur_probability,
        **shared,
    )
    local_views = draw_views(
        generator(Purpose.LOCAL_VIEWS),
        num_views=crops.num_locals,
        scale=crops.local_scale,
        per_frame_boxes=True,
        flip_probability=0.0,
        blur_probability=crops.local_blur_probability,
        **shared,
    )
    num_objects = min(tracking.num_objects, config.model.num_heads)
    draws = num_clips if tracking.heads_per == "clip" else 1
    rng = generator(Purpose.HEADS)
    heads = np.stack([rng.permutation(config.model.num_heads)[:num_objects] for _ in range(draws)])
    return SlotDraws(
        global_views=global_views,
        local_views=local_views,
        heads=torch.from_numpy(np.broadcast_to(heads, (num_clips, num_objects)).copy()),
        noise=_mask_noise(config, generator(Purpose.RANDOM_MASKS)) if tracking.kind == "random" else None,
        network_seed=slot_seed(config.run.seed, step, slot, Purpose.NETWORK),
        object_weight=object_weight(config, step),
    )


def slot_inputs(
    clips: NDArray[np.uint8], valid: NDArray[np.bool_], draws: SlotDraws, device: torch.device
) -> dict[str, Tensor]:
    """Copy a slot's readable clips, and what was drawn for them, to the device.

    Args:
        clips: (M, T, H, W, 3) uint8.
        valid: (M,) mask of the readable clips.
        draws: the slot's draws.
        device: the training's.

    Returns:
        clips, heads, noise (if there is any), and the parameters of `render_slot`, each with a row for a readable clip.
    """
    rows = np.flatnonzero(valid)
    chosen = slice(None) if valid.all() else rows
    drawn = {"heads": draws.heads} | ({} if draws.noise is None else {"noise": draws.noise})
    for name, views in (("global", draws.global_views), ("local", draws.local_views)):
        drawn |= {f"{name} {field}": tensor for field, tensor in vars(views).items()}
    with part("upload"):
        copied = {name: upload(tensor[chosen], device) for name, tensor in drawn.items()}
        return copied | {"clips": upload_clips(clips, rows, device)}


def render_slot(inputs: Mapping[str, Tensor], crops: CropsConfig) -> tuple[Tensor, Tensor]:
    """Return the global and the local views of `slot_inputs`, see `render`."""
    clips = inputs["clips"]
    globals_ = render(clips, _views(inputs, "global"), size=crops.global_size)
    locals_ = render(clips, _views(inputs, "local"), size=crops.local_size, interpolation=crops.local_interpolation)
    return globals_, locals_


def _views(inputs: Mapping[str, Tensor], name: str) -> ViewParameters:
    return ViewParameters(**{field.name: inputs[f"{name} {field.name}"] for field in fields(ViewParameters)})


def _mask_noise(config: Config, rng: np.random.Generator) -> Tensor:
    num_patches = (config.crops.global_size // config.model.patch_size) ** 2
    shape = (config.optim.clips_per_slot, config.tracking.num_objects, config.clip.num_frames, num_patches)
    return torch.from_numpy(rng.random(shape, dtype=np.float32))
