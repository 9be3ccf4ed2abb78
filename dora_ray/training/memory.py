"""Memory of a training worker: estimate a step's peak, and keep freed memory in the process."""

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
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def estimate_memory_mb(config: Config, *, half: bool) -> dict[str, float]:
    """Estimate the megabytes of a worker's tensors at the peak of a step, by purpose.

    Counts the shapes that autograd keeps. Allocator overhead, libraries and the CUDA context are not included.

    Args:
        config: the run's.
        half: whether the networks compute in bf16 (autocast), as on a GPU with optim.precision=bf16.

    Returns:
        weights: student and teacher. optimizer: AdamW's two moments. snapshot: the copy of both that a checkpoint is
        written from. sums: a slot's gradients, their sum over slots, and that sum in float32. activations: tensors
        that the student keeps for the backward, and gradients in flight. views: clips and rendered views. loss: the
        last layer, a chunk of its outputs, the teacher's outputs. total.
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
        # The last layer's normalized direction, its rows, and the gradients of both; outputs and their softmax.
        "loss": 4 * (4 * outputs * width + 2 * min(CHUNK_OUTPUTS, outputs * _num_views(config)))
        + 3 * 4 * clips * frames * config.num_globals * outputs,
    }
    return {name: size / MB for name, size in sizes.items()} | {"total": sum(sizes.values()) / MB}


def _num_views(config: Config) -> int:
    """Number of images that the student sees in a slot."""
    return config.optim.clips_per_slot * config.clip.num_frames * (_num_large(config) + config.crops.num_locals)


def _num_large(config: Config) -> int:
    """Number of global-size views of a frame that the student sees."""
    return config.num_globals if config.tracking.kind == "none" else config.tracking.num_objects


def tokens_of_slot(config: Config) -> tuple[int, int]:
    """Return a slot's number of tokens, for the teacher and for the student (masked views counted in full)."""
    crops, frames = config.crops, config.optim.clips_per_slot * config.clip.num_frames
    of_large, of_small = (1 + (size // config.model.patch_size) ** 2 for size in (crops.global_size, crops.local_size))
    return frames * config.num_globals * of_large, frames * (
        _num_large(config) * of_large + crops.num_locals * of_small
    )


def _activation_bytes(config: Config, *, half: bool) -> int:
    """Return the bytes of activations kept for the backward.

    Per token a block keeps, in multiples of the width D: its input and the sum after attention (the residual stream,
    float32), both of them normalized, queries, keys, values, the attention output, and four widths before GELU.
    """
    model, (_, tokens) = config.model, tokens_of_slot(config)
    size = 2 if half else 4
    block = model.width * (2 * 4 + (2 + 3 + 1 + 4) * size)
    recomputes = config.optim.activation_checkpointing
    kept = 4 * model.width if recomputes else block
    # Backward of one block: the MLP's inner values and gradient, the tokens' gradient, the recomputed block (if any).
    passing = model.width * (4 + 8 * size) + (block if recomputes else 0)
    patches = 3 * model.patch_size**2 * size
    # The last block passes on CLS alone, so it is not counted.
    return tokens * ((model.depth - 1) * kept + passing + patches)


def peak_mb() -> float:
    """Return this process's peak memory in MiB. Linux's getrusage would include its parent's before the exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the next allocation (Linux with glibc).

    By default malloc returns large blocks to the kernel at once and gets zeroed pages back, several times for every
    activation of a step on the CPU. With this setting the process never shrinks.

    Returns:
        True if the allocator accepted the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
