"""Matrix products of a piece of work: their shapes, and the time that they take alone."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dora_ray.method.parts import watched

# (batch, m, k, n, type): batched products of (m, k) with (k, n).
Product = tuple[int, int, int, int, torch.dtype]
REPEATS = 3
# Row alignment in elements: 16 bytes in half precision.
ROW_MULTIPLE = 8


@dataclass
class Products:
    """Counts of products by shape.

    Attributes:
        counts: number of times that each was computed.
    """

    counts: Counter[Product] = field(default_factory=Counter)

    @property
    def flops(self) -> int:
        """Operations of all products: 2 per multiply-add."""
        return sum(2 * b * m * k * n * count for (b, m, k, n, _), count in self.counts.items())

    def by_type(self) -> dict[torch.dtype, Products]:
        """Return the products of each number type."""
        found: dict[torch.dtype, Products] = defaultdict(Products)
        for product, count in self.counts.items():
            found[product[-1]].counts[product] = count
        return dict(found)

    def seconds(self, device: torch.device) -> float:
        """Time all products back to back, in the memory layout in which they are multiplied."""
        return sum(_seconds(product, count, device) for product, count in self.counts.items())


def record(work: Callable[[], Any]) -> Products:
    """Record the products that `work` computes, except those that resample views.

    Fused attention counts as its plain products: two forward and four backward, without the logits that its backward
    recomputes.
    """
    products = Products()
    recorder = _Recorder(products.counts)
    with watched(recorder.part), recorder:
        work()
    return products


def square_flops_per_second(size: int, kind: torch.dtype, device: torch.device) -> float:
    """Return the rate of one large square product."""
    return 2 * size**3 / min(_seconds((1, size, size, size, kind), 1, device) for _ in range(REPEATS))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Recorder(TorchDispatchMode):
    """Intercepts every operator before it runs."""

    def __init__(self, counts: Counter[Product]) -> None:
        TorchDispatchMode.__init__(self)
        self._counts = counts
        self._resamples = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Track the current part of a step."""
        self._resamples = name == "augment"
        yield
        self._resamples = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._resamples:
            self._look(func.overloadpacket.__name__.removesuffix("_"), args)
        return func(*args, **(kwargs or {}))

    def _look(self, name: str, args: Any) -> None:
        if name in ("mm", "bmm"):
            self._count(args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self._count(args[1], args[2])
        elif name.startswith("_scaled_dot_product"):
            backward = name.endswith("_backward")
            query, key = args[1:3] if backward else args[:2]
            heads, (m, d), n = query.shape[:-2].numel(), query.shape[-2:], key.shape[-2]
            # Products of the logits, and of the weights with the values; the backward has two of each.
            for _ in range(2 if backward else 1):
                self._count_shape(heads, m, d, n, query.dtype)
                self._count_shape(heads, m, n, d, query.dtype)

    def _count(self, left: torch.Tensor, right: torch.Tensor) -> None:
        batch = left.shape[0] if left.ndim == 3 else 1
        self._count_shape(batch, left.shape[-2], left.shape[-1], right.shape[-1], left.dtype)

    def _count_shape(self, batch: int, m: int, k: int, n: int, kind: torch.dtype) -> None:
        self._counts[batch, m, k, n, kind] += 1


def _matrices(batch: int, rows: int, columns: int, device: torch.device, kind: torch.dtype) -> torch.Tensor:
    stride = -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE if device.type == "cuda" else columns
    return torch.empty(batch, rows, stride, device=device, dtype=kind)[:, :, :columns]


def _seconds(product: Product, count: int, device: torch.device) -> float:
    """Return the seconds of `count` consecutive products of one shape, after a warm-up product.

    Operands are random, since equal numbers draw less GPU power, and rows are aligned for the GPU's fast kernels.
    """
    batch, m, k, n, kind = product
    left, right = (_matrices(batch, *shape, device, kind).normal_() for shape in ((m, k), (k, n)))
    out = _matrices(batch, m, n, device, kind)
    if batch == 1:
        left, right, out = left[0], right[0], out[0]
    torch.matmul(left, right, out=out)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        torch.matmul(left, right, out=out)
    synchronize(device)
    return time.perf_counter() - started
