"""Asynchronous copies of tensors from the host to a device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without blocking the host.

    Only copies from pinned memory are asynchronous; before any other copy, the host may wait for all pending GPU work.
    """
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor
    return pinned.to(device, non_blocking=True)


def upload_beside(pinned: Tensor, device: torch.device) -> Tensor:
    """Copy pinned memory to a GPU on a side stream, concurrently with computation already queued.

    On the computation's stream, the copy would wait for the queued work, and the next slot for the copy.
    """
    beside, current = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        copied = pinned.to(device, non_blocking=True)
    current.wait_stream(beside)
    # The side stream owns this memory and must not reuse it before the current stream is done with it.
    copied.record_stream(current)
    return copied


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
