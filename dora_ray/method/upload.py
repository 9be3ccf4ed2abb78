"""Tensors from the host to a device, without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; the host goes on while it is copied.

    Only from pinned memory does a GPU copy by itself; before a copy from any other, the host may wait for all that the
    GPU still has to do.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
