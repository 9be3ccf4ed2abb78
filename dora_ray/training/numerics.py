"""Torch settings of a training process, shared by workers and benchmarks."""

from __future__ import annotations

import os

import torch

from dora_ray.config import OptimConfig
from dora_ray.errors import ClusterError
from dora_ray.training.memory import keep_freed_memory

# Lowest compute capability with fp8 (Ada); Hopper has 9.0.
FP8_CAPABILITY = (8, 9)
# Part of torch's error for a kernel without a fixed order of additions.
NOT_DETERMINISTIC = "does not have a deterministic implementation"


def prepare_torch(device: torch.device, config: OptimConfig, *, deterministic: bool) -> None:
    """Set torch up for training on a device.

    On a GPU with optim.precision=bf16, the matrix products that stay in float32 (the tracker, the loss over all
    outputs) use TF32: factors of eleven bits, sums in float32, several times float32's rate. Emulating this in the
    tracker flips 0.02 % of the mask patches; bf16 in the networks flips 0.21 %. With optim.precision=float32 these
    products are computed in full float32.
    `deterministic` raises instead of warning: if torch only warns, the attention backward keeps its faster kernels,
    which add in no fixed order.
    """
    if device.type != "cuda":
        keep_freed_memory()
        return
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "bf16"
    # With packed views the number of tokens varies by slot, and blocks of fixed sizes would fragment the memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # A debugging aid that would fill every empty tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_fp8(device: torch.device) -> bool:
    """Return whether the device computes matrix products in fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def require_fp8(device: torch.device) -> None:
    """Refuse a GPU without fp8. A CPU is accepted: it emulates fp8, slowly, with the same results.

    Raises:
        ClusterError: the GPU has no fp8; the message names it.
    """
    if device.type == "cuda" and not has_fp8(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ClusterError(
            f"optim.teacher_precision=fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or "
            f"newer (Ada, Hopper); {torch.cuda.get_device_name(device)} has {major}.{minor}: use bf16"
        )
