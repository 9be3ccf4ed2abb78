"""Training that repeats one step on the same clips, with timings of the step and its parts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_ray.bench.products import synchronize
from dora_ray.config import Config, load_config
from dora_ray.method.dora import slot_forward
from dora_ray.method.parts import watched
from dora_ray.training.memory import peak_mb
from dora_ray.training.reduction import SlotSums, next_exponents
from dora_ray.training.step import SlotForward, apply_step, initial_state, sum_slots

# Share of patches that an object view keeps when packed views are timed.
KEEP_SHARE = 0.4
# One slot a step, in the exact form.
ALONE = (
    "optim.slots=1",
    "optim.freeze_last_layer_steps=0",
    "cluster.num_workers=0",
    "tracking.views=masked",
    "tracking.every_steps=1",
)


class Timed:
    """Training that repeats its first step on the same clips.

    Args:
        config: configuration of the run; a step is one slot.
        device: device of the computation.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.state = initial_state(config, device)
        size, rng = config.crops.clip_size, np.random.default_rng(0)
        shape = (config.optim.clips_per_slot, config.clip.num_frames, size, size, 3)
        clips = rng.integers(0, 256, shape, dtype=np.uint8)
        self.batch: Any = SimpleNamespace(step=0, slot=0, clips=clips, valid=np.ones(shape[0], bool))

    @property
    def sizes(self) -> list[int]:
        """Elements of each quantity that slots add: gradients, and the teacher's outputs."""
        return [*(p.numel() for p in self.state.student.parameters()), self.state.center.numel()]

    def step(self, config: Config, forward: SlotForward, *, number: int = 0) -> float:
        """Run the step with the given number; return its seconds."""
        self.state.step = self.batch.step = number
        records = torch.zeros(0, dtype=torch.int64)
        synchronize(self.device)
        started = time.perf_counter()
        apply_step(self.state, sum_slots(self.state, [self.batch], records, config, None, forward), config)
        synchronize(self.device)
        return time.perf_counter() - started

    def peaks(self, paths: dict[str, Callable[[], float]]) -> dict[str, float]:
        """Return the peak megabytes of each path on a GPU, one after the other."""
        found = {}
        for name, path in paths.items():
            torch.cuda.reset_peak_memory_stats(self.device)
            path()
            found[name] = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.empty_cache()
        return found

    def rounds(
        self, paths: dict[str, Callable[[], float]], counts: dict[str, int]
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Return each path's seconds by round, for `counts` rounds, and the process's peak MB after its first one."""
        seconds: dict[str, list[float]] = defaultdict(list)
        peak: dict[str, float] = {}
        for number in range(max(counts.values())):
            for name, path in paths.items():
                if number < counts[name]:
                    seconds[name].append(path())
                    peak.setdefault(name, peak_mb())
        return dict(seconds), peak

    def masks(self) -> Tensor:
        """Return (M, K, T, N) masks of random patches, whose shares vary around KEEP_SHARE."""
        config = self.config
        count = (config.crops.global_size // config.model.patch_size) ** 2
        shape = (config.optim.clips_per_slot, config.tracking.num_objects, config.clip.num_frames)
        generator = torch.Generator().manual_seed(0)
        shares = KEEP_SHARE * (0.5 + torch.rand(*shape, 1, generator=generator))
        shares *= KEEP_SHARE / shares.mean()
        ranks = torch.rand(*shape, count, generator=generator).argsort(dim=-1)
        return (ranks < (shares * count).round()).float().to(self.device)

    def parts(self, config: Config) -> dict[str, Any]:
        """Time each part of one step, synchronizing the device around it, and both kinds of reduction."""
        config = load_config(config, "optim.cuda_graph=false")
        seconds: dict[str, float] = defaultdict(float)

        @contextmanager
        def watch(name: str) -> Iterator[None]:
            synchronize(self.device)
            started = time.perf_counter()
            yield
            synchronize(self.device)
            seconds[name] += time.perf_counter() - started

        with watched(watch):
            whole = self.step(config, slot_forward)
        seconds.pop("reduction")
        reductions = {f"reduction_{kind}": self._reduction(kind) for kind in ("exact", "float32")}
        return {"augment_share": seconds["augment"] / whole, "parts": dict(seconds) | reductions}

    def _reduction(self, kind: Any) -> float:
        """Return the seconds of adding one slot's quantities and converting the sum back."""
        sizes = self.sizes
        quantities = [torch.full((size,), 0.5, device=self.device) for size in sizes]
        exponents = torch.zeros(len(sizes), dtype=torch.int32)
        found = []
        for _ in range(2):
            synchronize(self.device)
            started = time.perf_counter()
            sums = SlotSums(sizes, num_records=0, num_slots=1, reduction=kind, exponents=exponents, device=self.device)
            sums.add(quantities)
            next_exponents(sums.all_reduce(None).largest, exponents, first=True)
            synchronize(self.device)
            found.append(time.perf_counter() - started)
        return min(found)
