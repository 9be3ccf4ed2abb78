"""Full precision for sensitive sums, regardless of the caller's autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def widen(value: Tensor) -> Tensor:
    """Convert half precision to float32; leave other types, such as float64, unchanged."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of tensors outside autocast, with its half-precision arguments converted to float32.

    Sinkhorn-Knopp, thresholds and softmaxes over 65,536 outputs amplify the rounding of bfloat16's eight bits: mask
    patches would flip with the batch's layout, and a mean of logits would lose its low bits.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device.type, enabled=False):
            wide_args = [widen(value) if isinstance(value, Tensor) else value for value in args]
            wide_kwargs = {key: widen(value) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
            return function(*wide_args, **wide_kwargs)  # type: ignore[arg-type]

    return run
