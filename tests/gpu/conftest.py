"""Tests for GPUs; GPU_TESTS_DEVICE=cpu rehearses those that a CPU can run. They need torch, timm and pydantic."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS reads it once, at its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Yield the device, with exact float32 products and deterministic kernels; restore torch's settings afterwards."""
    rehearses = os.environ.get("GPU_TESTS_DEVICE") == "cpu"
    if not rehearses and not torch.cuda.is_available():
        pytest.skip("needs a GPU; GPU_TESTS_DEVICE=cpu rehearses what a CPU can")
    before = torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield torch.device("cpu" if rehearses else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """Return the GPU, for tests that a CPU cannot even rehearse."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: a CPU has nothing like it")
    return device
