"""Forward and backward of timm's own ViT on whole frames: a training step without DoRA.

The share of matrix products in a transformer's training is mostly determined by the library: the rest of the time is
attention, GELU, norms and sums, each a pass over memory.
"""

from __future__ import annotations

import time

import torch

from dora_ray.bench.products import record, synchronize
from dora_ray.config import Config
from dora_ray.method.vit import build_vit
from dora_ray.weights import vit_arguments


class Yardstick:
    """Configured encoder as timm runs it, on the whole frames of one slot.

    Args:
        config: configuration of the run.
        device: device of the computation.
        half: use bf16 autocast.
    """

    def __init__(self, config: Config, device: torch.device, *, half: bool) -> None:
        self._vit = build_vit(**vit_arguments(config.model_dump(mode="json"))).to(device).train()
        self._device, self._half = device, half
        count, size = config.optim.clips_per_slot * config.clip.num_frames, config.crops.global_size
        self._images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        self._products = record(self._train)

    def matmul_share(self) -> float:
        """Return the time of its matrix products alone over that of forward and backward."""
        synchronize(self._device)
        started = time.perf_counter()
        self._train()
        synchronize(self._device)
        seconds = time.perf_counter() - started
        return self._products.seconds(self._device) / seconds

    def _train(self) -> None:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            outputs = self._vit(self._images)
        torch.autograd.grad(outputs.float().sum(), list(self._vit.parameters()))
