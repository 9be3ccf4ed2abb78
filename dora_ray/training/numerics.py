"""Torch's modes in a process that trains; the same for a worker and for a measurement of one."""

from __future__ import annotations

import os

import torch

from dora_ray.config import OptimConfig
from dora_ray.errors import ClusterError
from dora_ray.training.memory import keep_freed_memory

# Compute capability of the first GPUs with fp8: Ada; Hopper has 9.0.
FP8_CAPABILITY = (8, 9)
# What torch says of a kernel that adds in any order.
NOT_DETERMINISTIC = "does not have a deterministic implementation"


def prepare_torch(device: torch.device, config: OptimConfig, *, deterministic: bool) -> None:
    """Set torch up for the training on a device.

    On a GPU whose networks compute in bf16, products of what stays in float32 (the tracker, the loss over all outputs)
    round their factors to TF32's eleven bits and add in float32, at several times float32's rate. Emulated in the
    tracker that flips 0.02 % of the masks' patches, where bf16 in the networks flips 0.21 %. With
    optim.precision=float32 products are float32's.
    `deterministic` has to be strict: as long as torch only warns, attention's backward stays with its faster kernels,
    which add in any order.
    """
    if device.type != "cuda":
        keep_freed_memory()
        return
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "bf16"
    # Packed views have another number of tokens in each slot: blocks of fixed sizes would leave holes in the memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Made for debugging: every tensor that is allocated empty would be filled.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_fp8(device: torch.device) -> bool:
    """Return whether the device's matrix units compute in fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def require_fp8(device: torch.device) -> None:
    """Refuse a GPU without fp8. A CPU has none either, but gives the same numbers slowly.

    Raises:
        ClusterError: naming the GPU.
    """
    if device.type == "cuda" and not has_fp8(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ClusterError(
            f"optim.teacher_precision=fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or "
            f"newer (Ada, Hopper); {torch.cuda.get_device_name(device)} has {major}.{minor}: use bf16"
        )
