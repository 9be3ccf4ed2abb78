"""Tests that a GPU has to answer; GPU_TESTS_DEVICE=cpu rehearses what a CPU can. They need torch, timm and pydantic."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS reads it once, at its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where to compute, float32 products exact and kernels deterministic; afterwards torch is as it was."""
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
    """A GPU: for what a CPU cannot even rehearse."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: a CPU has nothing like it")
    return device
