"""Step on a GPU: equal bits for any order and grouping of slots, and no host synchronization in between."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.attention.varlen import varlen_attn

from dora_ray.config import Config
from dora_ray.method import attention
from dora_ray.method.dora import slot_forward
from dora_ray.training.numerics import prepare_torch
from dora_ray.training.step import apply_step, initial_state, slot_quantities, sum_slots
from tests.gpu.slots import NO_RECORDS, assert_equal, batch_of, config_of, masks_of

pytestmark = pytest.mark.gpu

VIEWS = pytest.mark.parametrize("views", ["masked", "packed"])


@pytest.fixture
def worker(device: torch.device) -> torch.device:
    """Return the device, configured as in a worker that trains in bf16."""
    prepare_torch(device, config_of("optim.precision=bf16").optim, deterministic=True)
    return device


def train(
    config: Config, device: torch.device, orders: Sequence[Sequence[int]], all_reduce: Any = None
) -> list[Tensor]:
    """Return weights, center and measures after a step for each order of the slots."""
    state, measures = initial_state(config, device), {}
    for step, order in enumerate(orders):
        batches = [batch_of(config, step, slot) for slot in order]
        measures, _ = apply_step(state, sum_slots(state, batches, NO_RECORDS, config, all_reduce), config)
    return [*(p.detach().cpu() for p in state.student.parameters()), state.center.cpu(), *measures.values()]


@VIEWS
def test_exact_sums_give_equal_bits_twice_and_for_two_orders_of_the_slots(worker, views):
    config = config_of("optim.precision=bf16", "optim.reduction=exact", f"tracking.views={views}")
    first = train(config, worker, [[0, 1, 2, 3], [0, 1, 2, 3]])
    assert_equal(train(config, worker, [[0, 1, 2, 3], [0, 1, 2, 3]]), first)
    assert_equal(train(config, worker, [[2, 0, 3, 1], [3, 2, 1, 0]]), first)
    before = list(initial_state(config, worker).student.parameters())
    assert not any(torch.equal(one, other.cpu()) for one, other in zip(first[: len(before)], before, strict=True))


@pytest.mark.parametrize("share", [0.3, 0.9])
@VIEWS
def test_a_slot_repeats_bit_for_bit(worker, monkeypatch, views, share):
    """Packed views of many lengths, some over 128 tokens, use the variable-length attention kernel."""
    config = config_of("optim.precision=bf16", f"tracking.views={views}")
    state, one = initial_state(config, worker), batch_of(config, 0, 0)
    forward = partial(slot_forward, masks=masks_of(config, share).to(worker))
    longest = []

    def kernel(*arguments: Any, **options: Any) -> Tensor:
        longest.append(arguments[6])
        return varlen_attn(*arguments, **options)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    first, again = (slot_quantities(state, one, config, forward) for _ in range(2))
    assert_equal(first, again)
    assert any(quantity.any() for quantity in first)
    assert (min(longest, default=0) > 128) == (views == "packed" and worker.type == "cuda")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_does_not_wait_within_a_slot_of_masked_views(gpu):
    """The first slot may synchronize: it copies constants, and initializes cuDNN and cuBLAS."""
    config = config_of("optim.precision=bf16")
    prepare_torch(gpu, config.optim, deterministic=True)
    state = initial_state(config, gpu)
    slot_quantities(state, batch_of(config, 0, 0), config)
    torch.cuda.set_sync_debug_mode("error")
    try:
        slot_quantities(state, batch_of(config, 0, 1), config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_waits_once_a_step(gpu):
    """The host waits once, for the sums; reading the measures waits, too."""
    config = config_of("optim.precision=bf16", "optim.reduction=exact")
    prepare_torch(gpu, config.optim, deterministic=True)
    state = initial_state(config, gpu)

    def step(number: int) -> None:
        batches = [batch_of(config, number, slot) for slot in range(config.optim.slots)]
        apply_step(state, sum_slots(state, batches, NO_RECORDS, config, None), config)

    step(0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchronizing CUDA operation" in str(one.message)]
    assert len(waits) == 1, waits


def test_exact_sums_through_the_collective_are_those_without(worker, tmp_path):
    """A single rank, so that one GPU suffices; the test shows that NCCL adds int64."""
    config = config_of("optim.precision=bf16", "optim.reduction=exact")
    alone = train(config, worker, [[0, 1, 2, 3]])
    backend = "nccl" if worker.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_equal(train(config, worker, [[0, 1, 2, 3]], distributed.all_reduce), alone)
    finally:
        distributed.destroy_process_group()
