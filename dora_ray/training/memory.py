"""Memory of a training worker: how much a step will need, and how to keep what was had."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

from dora_ray.config import Config
from dora_ray.method.dora import build_network
from dora_ray.method.losses import CHUNK_OUTPUTS
from dora_ray.weights import network_arguments

MB = 2**20
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def estimate_memory_mb(config: Config, *, half: bool) -> dict[str, float]:
    """Megabytes that a worker's tensors take at the height of a step, by what they are for.

    Counted from the shapes of what autograd keeps, so without the allocator's waste, libraries and CUDA's own context.

    Args:
        config: the run's.
        half: whether the networks compute in bf16 (autocast), as on a GPU with optim.precision=bf16.

    Returns:
        weights: student and teacher. optimizer: AdamW's two moments. snapshot: the copy of both that a checkpoint is
        written from. sums: a slot's gradients, their sum over slots,
        and the sum as floats. activations: what the student keeps for the backward, and the gradients on their way.
        views: clips and rendered views. loss: the last layer, a chunk of its outputs, the teacher's outputs. total.
    """
    with torch.device("meta"):
        network = build_network(**network_arguments(config.model_dump(mode="json")))
    count = sum(parameter.numel() for parameter in network.parameters())
    clips, frames = config.optim.clips_per_slot, config.clip.num_frames
    pixels = config.num_globals * config.crops.global_size**2 + config.crops.num_locals * config.crops.local_size**2
    outputs, width = config.head.num_outputs, config.head.bottleneck_width
    sizes = {
        "weights": 2 * 4 * count,
        "optimizer": 2 * 4 * count,
        "snapshot": 4 * 4 * count,
        "sums": (4 + 4 + (8 if config.optim.reduction == "exact" else 4)) * count,
        "activations": _activation_bytes(config, half=half),
        "views": clips * frames * 3 * (4 * pixels + config.crops.clip_size**2),
        # The layer's direction of unit length, its rows and their gradients; outputs and their softmax.
        "loss": 4 * (4 * outputs * width + 2 * min(CHUNK_OUTPUTS, outputs * _num_views(config)))
        + 3 * 4 * clips * frames * config.num_globals * outputs,
    }
    return {name: size / MB for name, size in sizes.items()} | {"total": sum(sizes.values()) / MB}


def _num_views(config: Config) -> int:
    """Images that the student sees in a slot."""
    return config.optim.clips_per_slot * config.clip.num_frames * (_num_large(config) + config.crops.num_locals)


def _num_large(config: Config) -> int:
    """Large views of a frame that the student sees."""
    return config.num_globals if config.tracking.kind == "none" else config.tracking.num_objects


def tokens_of_slot(config: Config) -> tuple[int, int]:
    """Tokens of all sequences of a slot, of the teacher and, with masked views, of the student."""
    crops, frames = config.crops, config.optim.clips_per_slot * config.clip.num_frames
    of_large, of_small = (1 + (size // config.model.patch_size) ** 2 for size in (crops.global_size, crops.local_size))
    return frames * config.num_globals * of_large, frames * (
        _num_large(config) * of_large + crops.num_locals * of_small
    )


def _activation_bytes(config: Config, *, half: bool) -> int:
    """Memory that the backward needs for every token.

    A block keeps, in multiples of the width D: its input and the sum after the attention (the residual stream, in
    float32), both normalized, queries, keys, values, what attention mixed, and four widths before GELU.
    """
    model, (_, tokens) = config.model, tokens_of_slot(config)
    size = 2 if half else 4
    block = model.width * (2 * 4 + (2 + 3 + 1 + 4) * size)
    recomputes = config.optim.activation_checkpointing
    kept = 4 * model.width if recomputes else block
    # In the backward of one block: the MLP's inner values and gradient, the tokens' gradient, perhaps all of it again.
    passing = model.width * (4 + 8 * size) + (block if recomputes else 0)
    patches = 3 * model.patch_size**2 * size
    # Of the last block only CLS goes on.
    return tokens * ((model.depth - 1) * kept + passing + patches)


def peak_mb() -> float:
    """Most memory that this process has had; Linux's getrusage would count that of its parent before the exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for the next allocation, on Linux with glibc.

    By default it gives large blocks back at once, and the kernel hands out zeroed pages anew, several times for every
    activation of a step on the CPU. The process then stays as large as it ever was.

    Returns:
        Whether the allocator could be told so.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
