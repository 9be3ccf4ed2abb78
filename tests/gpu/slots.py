"""Small training with the heads and sequence lengths of a ViT-S/16, and its slots."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_ray.config import Config, load_config
from tests.conftest import SMALL

# 196 patches in an object view and 145 tokens in a local one.
OVERRIDES = (
    "model.width=384",
    "model.patch_size=16",
    "crops.clip_size=224",
    "crops.global_size=224",
    "crops.local_size=192",
    "crops.num_locals=2",
    "optim.freeze_last_layer_steps=0",
)

NO_RECORDS = torch.zeros(0, dtype=torch.int64)


def config_of(*overrides: str) -> Config:
    """Return the configuration of 4 slots of 2 clips of 2 frames."""
    return load_config("tiny", *SMALL, *OVERRIDES, *overrides)


def batch_of(config: Config, step: int, slot: int) -> Any:
    """Return a slot's clips: smooth noise, so that crops of one clip resemble each other."""
    size, count = config.crops.clip_size, config.optim.clips_per_slot
    rng = np.random.default_rng([step, slot])
    coarse = rng.integers(0, 256, (count, config.clip.num_frames, size // 16, size // 16, 3), dtype=np.uint8)
    clips = coarse.repeat(16, axis=2).repeat(16, axis=3)
    return SimpleNamespace(step=step, slot=slot, clips=clips, valid=np.ones(count, bool))


def masks_of(config: Config, share: float) -> Tensor:
    """Return (M, K, T, N) masks, each with a random share of its patches up to `share`, and at least one patch."""
    shape = (config.optim.clips_per_slot, config.tracking.num_objects, config.clip.num_frames, 196)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(shape, generator=generator) < share * torch.rand((*shape[:3], 1), generator=generator)
    masks[..., 0] = True
    return masks.float()


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Assert that two lists of tensors are equal bit for bit."""
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the Euclidean distance relative to the expected length."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
