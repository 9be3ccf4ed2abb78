"""Time of a step's all-reduce over two processes, in fixed point and in float32, which has half the bytes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from typing import get_args

import torch
from torch import distributed

from dora_ray.bench.products import synchronize
from dora_ray.training.reduction import Reduction, SlotSums

NUM_RANKS = 2
REPEATS = 3
TIMEOUT = timedelta(seconds=120)


def all_reduce_seconds(sizes: Sequence[int]) -> dict[str, float]:
    """Return the seconds of an all-reduce over two local processes with the conversion back, the least of three.

    The processes use gloo over local memory. NCCL needs one GPU per process: it is used with two or more GPUs.

    Args:
        sizes: number of elements of each quantity.

    Returns:
        A value for each kind of reduction.
    """
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(NUM_RANKS, get_context("spawn")) as pool:
        work = partial(
            _seconds_of_rank,
            sizes=list(sizes),
            store=f"file://{folder}/store",
            gpus=torch.cuda.device_count() >= NUM_RANKS,
            num_threads=max(1, torch.get_num_threads() // NUM_RANKS),
        )
        return next(pool.map(work, range(NUM_RANKS)))


def _seconds_of_rank(rank: int, *, sizes: list[int], store: str, gpus: bool, num_threads: int) -> dict[str, float]:
    torch.set_num_threads(num_threads)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    distributed.init_process_group(
        "nccl" if gpus else "gloo", init_method=store, rank=rank, world_size=NUM_RANKS, timeout=TIMEOUT
    )
    exponents = torch.zeros(len(sizes), dtype=torch.int32)
    kinds: tuple[Reduction, ...] = get_args(Reduction)

    def all_reduce(tensor: torch.Tensor) -> None:
        distributed.all_reduce(tensor)

    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        for _ in range(REPEATS):
            for kind in kinds:
                sums = SlotSums(
                    sizes, num_records=0, num_slots=NUM_RANKS, reduction=kind, exponents=exponents, device=device
                )
                # Both start together, with connections established.
                distributed.all_reduce(torch.zeros(1, device=device))
                synchronize(device)
                started = time.perf_counter()
                sums.all_reduce(all_reduce)
                synchronize(device)
                found[kind].append(time.perf_counter() - started)
    finally:
        distributed.destroy_process_group()
    return {kind: min(seconds) for kind, seconds in found.items()}
