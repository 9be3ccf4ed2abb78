"""Ranks as threads of one process: a real all-reduce without process groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result")


def run_ranks(
    world_size: int, work: Callable[[int, Callable[[Tensor], None]], Result], *, in_turn: bool = False
) -> list[Result]:
    """`work(rank, all_reduce)` on every rank at once; their results.

    Args:
        world_size: ranks.
        work: what each of them does.
        in_turn: between two reductions one rank works at a time: threads share torch's random numbers.
    """
    barrier, turn = threading.Barrier(world_size), threading.Lock()
    shared: list[Tensor | None] = [None] * world_size

    def one(rank: int) -> Result:
        def all_reduce(tensor: Tensor) -> None:
            shared[rank] = tensor.clone()
            if in_turn:
                turn.release()
            barrier.wait()
            total = sum(part for part in shared if part is not None)
            barrier.wait()
            tensor.copy_(total)
            if in_turn:
                turn.acquire()

        try:
            if not in_turn:
                return work(rank, all_reduce)
            with turn:
                return work(rank, all_reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(world_size)]]
