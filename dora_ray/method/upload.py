"""Tensors from the host to a device, without making the host wait."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; the host goes on while it is copied.

    Only from pinned memory does a GPU copy by itself; before a copy from any other, the host may wait for all that the
    GPU still has to do.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def upload_beside(pinned: Tensor, device: torch.device) -> Tensor:
    """Copy pinned memory to a GPU while it computes what was asked of it before.

    On the stream of the computation the copy would wait for all of that, and the next slot for the copy.
    """
    beside, current = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        copied = pinned.to(device, non_blocking=True)
    current.wait_stream(beside)
    # Its memory belongs to the other stream, which must not use it again before this one is through with it.
    copied.record_stream(current)
    return copied


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
