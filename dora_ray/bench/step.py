"""The training step: views, forward, backward, exact sum and update, beside the same step with a naive forward.

Works without Ray. The naive forward is `method.reference`: one for each frame and each view, all attention matrices
kept, the loss one pair of outputs at a time. All else of the step is the same for both.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_ray.bench.products import Products, record, square_flops_per_second, synchronize
from dora_ray.config import Config, load_config
from dora_ray.method.dora import slot_forward
from dora_ray.method.parts import watched
from dora_ray.method.reference import reference_slot_forward
from dora_ray.training.memory import estimate_memory_mb, peak_mb
from dora_ray.training.numerics import prepare_torch
from dora_ray.training.reduction import SlotSums, next_exponents
from dora_ray.training.step import SlotForward, apply_step, initial_state, sum_slots

# One slot a step, in the exact form. On a CPU a ViT-Ti/16 with a small head; on a GPU the recipe `paper` as it is.
ALONE = (
    "optim.slots=1",
    "optim.freeze_last_layer_steps=0",
    "cluster.num_workers=0",
    "tracking.views=masked",
    "tracking.every_steps=1",
)
ON_CPU = ("model.name=vit_tiny_patch16_224", "head.num_outputs=4096", "optim.clips_per_slot=2")
# Share of its patches that an object view keeps where packed views are timed.
KEEP_SHARE = 0.4


def run(*, quick: bool, config: Config | None = None) -> dict[str, Any]:
    """Seconds of a step: ours, with packed object views, and the reference's; medians over rounds taken in turns.

    Args:
        quick: two rounds of ours and one of the reference instead of five each.
        config: what to train; not given: the recipe `paper` on a GPU, ViT-Ti/16 with 4096 outputs and 2 clips on a CPU.

    Returns:
        seconds_per_step, reference_seconds_per_step, ratio (ours / reference), packed_seconds_per_step and packed_ratio
        (masked / packed, at a keep share of 0.4); tflop_per_step and matmul_share (what the step's matrix products take
        by themselves, one after the other, over what the step of the same round takes), square_matmul_share (what they
        would take at the rate of a large square product); peak memory, clips a second, the seconds of the step's parts,
        and the setting.
    """
    device = torch.device("cuda" if (config.cluster.use_gpu if config else torch.cuda.is_available()) else "cpu")
    if config is None:
        config = load_config("paper", *(() if device.type == "cuda" else ON_CPU))
    config = load_config(config, *ALONE)
    prepare_torch(device, deterministic=config.run.deterministic)
    timed = _Timed(config, device)
    packed = load_config(config, "tracking.views=packed") if _has_objects(config) else None
    ours = functools.partial(timed.step, config, slot_forward)
    paths: dict[str, Callable[[], float]] = {"ours": ours}
    if packed is not None:
        paths["packed"] = functools.partial(timed.step, packed, functools.partial(slot_forward, masks=timed.masks()))
    # The first step of ours is the one whose products are written down.
    products = record(ours)
    # In turns with the steps: shared machines change their speed within a minute.
    paths["products"] = functools.partial(products.seconds, device)
    seconds, peak = timed.rounds(paths, count=2 if quick else 5, reference_count=1 if quick else 5)
    parts = timed.parts(config)
    return _result(config, device, seconds, peak, parts, products)


def _has_objects(config: Config) -> bool:
    return config.tracking.kind != "none" and config.tracking.threshold != "soft"


class _Timed:
    """A training that repeats its first step on the same clips.

    Args:
        config: of the run; a step is one slot.
        device: where it is computed.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.state = initial_state(config, device)
        size, rng = config.crops.clip_size, np.random.default_rng(0)
        shape = (config.optim.clips_per_slot, config.clip.num_frames, size, size, 3)
        clips = rng.integers(0, 256, shape, dtype=np.uint8)
        self.batch: Any = SimpleNamespace(step=0, slot=0, clips=clips, valid=np.ones(shape[0], bool))

    def step(self, config: Config, forward: SlotForward) -> float:
        """Seconds of one step."""
        self.state.step = 0
        records = torch.zeros(0, dtype=torch.int64)
        synchronize(self.device)
        started = time.perf_counter()
        apply_step(self.state, sum_slots(self.state, [self.batch], records, config, None, forward), config)
        synchronize(self.device)
        return time.perf_counter() - started

    def rounds(
        self, paths: dict[str, Callable[[], float]], *, count: int, reference_count: int
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Seconds in each round, and peak megabytes in the first round, of each path.

        The reference comes last in a round: on a CPU the peak is the process's, which never goes down.
        """
        reference = functools.partial(self.step, self.config, reference_slot_forward)
        seconds: dict[str, list[float]] = defaultdict(list)
        peak: dict[str, float] = {}
        for number in range(max(count, reference_count)):
            due = {
                **(paths if number < count else {}),
                **({"reference": reference} if number < reference_count else {}),
            }
            for name, path in due.items():
                _reset_peak(self.device)
                seconds[name].append(path())
                peak.setdefault(name, _peak_memory_mb(self.device))
        return dict(seconds), peak

    def masks(self) -> Tensor:
        """(M, K, T, N) masks of random patches, each with its own share around the stated one."""
        config = self.config
        count = (config.crops.global_size // config.model.patch_size) ** 2
        shape = (config.optim.clips_per_slot, config.tracking.num_objects, config.clip.num_frames)
        generator = torch.Generator().manual_seed(0)
        shares = KEEP_SHARE * (0.5 + torch.rand(*shape, 1, generator=generator))
        shares *= KEEP_SHARE / shares.mean()
        ranks = torch.rand(*shape, count, generator=generator).argsort(dim=-1)
        return (ranks < (shares * count).round()).float().to(self.device)

    def parts(self, config: Config) -> dict[str, float]:
        """Seconds of each part of one step, the device waited for at both ends, and of both kinds of reduction."""
        seconds: dict[str, float] = defaultdict(float)

        @contextmanager
        def watch(name: str) -> Iterator[None]:
            synchronize(self.device)
            started = time.perf_counter()
            yield
            synchronize(self.device)
            seconds[name] += time.perf_counter() - started

        with watched(watch):
            self.step(config, slot_forward)
        seconds.pop("reduction")
        return dict(seconds) | {f"reduction_{kind}": self._reduction(kind) for kind in ("exact", "float32")}

    def _reduction(self, kind: Any) -> float:
        """Seconds of adding one slot's quantities and converting the sum back."""
        sizes = [*(p.numel() for p in self.state.student.parameters()), self.state.center.numel()]
        quantities = [torch.full((size,), 0.5, device=self.device) for size in sizes]
        exponents = torch.zeros(len(sizes), dtype=torch.int32)
        found = []
        for _ in range(2):
            synchronize(self.device)
            started = time.perf_counter()
            sums = SlotSums(sizes, num_records=0, num_slots=1, reduction=kind, exponents=exponents, device=self.device)
            sums.add(quantities)
            next_exponents(sums.all_reduce(None).quantities, exponents, first=True)
            synchronize(self.device)
            found.append(time.perf_counter() - started)
        return min(found)


def _result(
    config: Config,
    device: torch.device,
    seconds: dict[str, list[float]],
    peak: dict[str, float],
    parts: dict[str, float],
    products: Products,
) -> dict[str, Any]:
    """Everything that was measured, ratios first."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ours, reference, cuda = median["ours"], median["reference"], device.type == "cuda"
    shares = [alone / step for alone, step in zip(seconds["products"], seconds["ours"], strict=True)]
    kind = torch.bfloat16 if cuda and config.optim.precision == "bf16" else torch.float32
    square = square_flops_per_second(8192 if cuda else 1536, kind, device)
    result = {
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "network": f"{config.model.name}, {config.head.num_outputs} outputs, {str(kind).removeprefix('torch.')}",
        "slot": f"{config.optim.clips_per_slot} clips of {config.clip.num_frames} frames, "
        f"{config.tracking.num_objects} objects, {config.crops.num_locals} local views; "
        f"{config.crops.global_size} and {config.crops.local_size} px",
        "seconds_per_step": ours,
        "reference_seconds_per_step": reference,
        "ratio": ours / reference,
        "clips_per_second": config.optim.clips_per_slot / ours,
        "tflop_per_step": products.flops / 1e12,
        "tflop_per_second": products.flops / 1e12 / ours,
        "matmul_share": statistics.median(shares),
        "square_matmul_share": products.flops / ours / square,
        "square_matmul_tflop_per_second": square / 1e12,
        "peak_memory_mb": peak["ours"],
        "reference_peak_memory_mb": peak["reference"],
        "estimated_memory_mb": estimate_memory_mb(config, half=kind == torch.bfloat16)["total"],
        "parts": parts,
    }
    if "packed" in median:
        result |= {
            "packed_seconds_per_step": median["packed"],
            "packed_ratio": ours / median["packed"],
            "packed_keep_share": KEEP_SHARE,
        }
    return result


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_mb()
