"""Exact sums: independent of order and of the number of ranks, accurate, and safe when numbers grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dora_ray.training.reduction import RETRY_BITS, SlotSums, largest_of, next_exponents, raised_exponents
from tests.training.ranks import run_ranks

SIZES = [5, 1, 300]


def slot_values(num_slots: int, seed: int = 0, scale: float = 1.0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [scale * torch.randn(size, generator=generator) * 10.0 ** (-3 * i) for i, size in enumerate(SIZES)]
        for _ in range(num_slots)
    ]


def reduced(values: list[list[Tensor]], world_size: int, reduction: str, exponents: Tensor | None = None):
    scale = torch.zeros(len(SIZES), dtype=torch.int32) if exponents is None else exponents

    def work(rank: int, all_reduce):
        sums = SlotSums(
            SIZES,
            num_records=3,
            num_slots=len(values),
            reduction=reduction,
            exponents=scale,
            device=torch.device("cpu"),
        )
        for slot in range(rank, len(values), world_size):
            sums.add(values[slot])
        sums.set_records(torch.tensor([rank, 1, -(2**63) if rank == 0 else 0]))
        return sums.all_reduce(all_reduce if world_size > 1 else None)

    return run_ranks(world_size, work)


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_exact_sums_do_not_depend_on_the_ranks(world_size: int) -> None:
    values = slot_values(7)
    alone = reduced(values, 1, "exact")[0]
    for result in reduced(values, world_size, "exact"):
        for ours, theirs in zip(result.quantities, alone.quantities, strict=True):
            assert torch.equal(ours, theirs)


def test_float_sums_do_depend_on_the_ranks() -> None:
    """What `exact` is for: the same values, added in float32, differ in the last bits."""
    values = slot_values(7)
    alone, shared = reduced(values, 1, "float32")[0], reduced(values, 3, "float32")[0]
    assert not all(torch.equal(a, b) for a, b in zip(alone.quantities, shared.quantities, strict=True))
    for a, b in zip(alone.quantities, shared.quantities, strict=True):
        torch.testing.assert_close(a, b)


@given(seed=st.integers(0, 50), exponent=st.integers(-80, 40))
def test_few_operations_give_the_bits_of_many(seed: int, exponent: int) -> None:
    """A GPU adds all quantities together, a CPU one by one."""
    values, results = slot_values(3, seed, 2.0 ** (exponent - 4)), []
    for together in (False, True):
        exponents = torch.full((len(SIZES),), exponent, dtype=torch.int32)
        sums = SlotSums(
            SIZES, num_records=0, num_slots=3, reduction="exact", exponents=exponents, device=torch.device("cpu")
        )
        sums._together = together
        for quantities in values:
            sums.add(quantities)
        results.append(sums.all_reduce(None).quantities)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_largest_of_what_is_not_finite_is_not_finite(bad: float) -> None:
    quantities = [torch.tensor([1.0, bad, 2.0]), torch.tensor([-3.0, 2.0]), torch.zeros(0)]
    found = largest_of(quantities)
    assert torch.isfinite(found).tolist() == [False, True, True]
    assert found[1:].tolist() == [3.0, 0.0]


@given(scale=st.sampled_from([1e-6, 1.0, 1e3]), seed=st.integers(0, 20))
def test_exact_sums_are_accurate(scale: float, seed: int) -> None:
    values = slot_values(5, seed, scale)
    true = [torch.stack([slot[i].double() for slot in values]).sum(0) for i in range(len(SIZES))]
    exponents = next_exponents(largest_of([t.float() for t in true]), torch.zeros(3, dtype=torch.int32), first=True)
    result = reduced(values, 2, "exact", exponents)[0]
    assert not result.overflowed.any()
    for ours, exact in zip(result.quantities, true, strict=True):
        # Half a unit of the fixed point for each slot, then float32's own rounding.
        bound = 5 * 2.0**-46 * 2.0 ** float(torch.frexp(exact.abs().max()).exponent) + 2.0**-24 * exact.abs()
        assert ((ours.double() - exact).abs() <= bound).all()


@given(seed=st.integers(0, 50), exponent=st.integers(-80, 40))
def test_exact_sums_are_those_of_the_definition(seed: int, exponent: int) -> None:
    """round(x * 2^(46 - e)) in int64, quantity by quantity, to the bit."""
    values = slot_values(3, seed, 2.0 ** (exponent - 4))
    scale = 2.0 ** (46 - exponent)
    result = reduced(values, 1, "exact", torch.full((len(SIZES),), exponent, dtype=torch.int32))[0]
    for i, ours in enumerate(result.quantities):
        whole = sum((slot[i].double() * scale).round().to(torch.int64) for slot in values)
        assert torch.equal(ours, (whole.float().double() / scale).float())


@pytest.mark.parametrize("reduction", ["exact", "float32"])
def test_the_largest_values_come_back_with_the_records_to_the_bit(reduction: str) -> None:
    """The host waits once for both; the exponents of the next step are made of them."""
    quantities = [torch.tensor([0.1, -3.3e7]), torch.tensor([-1e-38]), torch.zeros(2), torch.empty(0)]
    sums = SlotSums(
        [q.numel() for q in quantities],
        num_records=1,
        num_slots=1,
        reduction=reduction,
        exponents=torch.tensor([26, -80, 0, 0], dtype=torch.int32),
        device=torch.device("cpu"),
    )
    sums.add(quantities)
    result = sums.all_reduce(None)
    assert result.largest.dtype == torch.float32
    assert torch.equal(result.largest, largest_of(result.quantities))
    assert float(result.largest[0]) == float(torch.tensor(3.3e7))


@pytest.mark.parametrize("reduction", ["exact", "float32"])
def test_records_are_added_over_ranks(reduction: str) -> None:
    for result in reduced(slot_values(4), 3, reduction):
        assert result.records.tolist() == [0 + 1 + 2, 3, -(2**63)]


def test_outgrown_scale_is_seen_by_every_rank_and_mended() -> None:
    values = slot_values(4, scale=2.0**20)
    exponents = torch.zeros(3, dtype=torch.int32)
    results = reduced(values, 2, "exact", exponents)
    assert all(result.overflowed[0] > 0 for result in results)
    exponents = raised_exponents(exponents, results[0].overflowed)
    assert exponents[0] == RETRY_BITS
    again = reduced(values, 2, "exact", raised_exponents(exponents, results[0].overflowed))[0]
    assert not again.overflowed.any()
    torch.testing.assert_close(again.quantities[0], torch.stack([slot[0] for slot in values]).sum(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["exact", "float32"])
def test_what_is_not_finite_is_seen_by_every_rank(bad: float, reduction: str) -> None:
    values = slot_values(4)
    values[2][1][0] = bad
    for result in reduced(values, 3, reduction):
        assert result.not_finite.tolist() == [0, 1, 0]


def test_exponents_follow_growth_and_forget_slowly() -> None:
    old = torch.tensor([0, 0, 5], dtype=torch.int32)
    quantities = [torch.tensor([3.0, -9.0]), torch.tensor([2.0**-20]), torch.zeros(4)]
    assert next_exponents(largest_of(quantities), old, first=False).tolist() == [4, -1, 5]
    assert next_exponents(largest_of(quantities), old, first=True).tolist() == [4, -19, 5]


def test_the_smallest_gradients_have_a_scale_too() -> None:
    """The scale of numbers near float32's least would be no float32 itself."""
    values = [[torch.full((size,), 1e-37) for size in SIZES]]
    exponents = torch.zeros(len(SIZES), dtype=torch.int32)
    for _ in range(120):
        result = reduced(values, 1, "exact", exponents)[0]
        exponents = next_exponents(largest_of(values[0]), exponents, first=False)
    assert not result.overflowed.any()
    assert all(bool(quantity.isfinite().all()) for quantity in result.quantities)
    assert all(
        float((sums - value).abs().max()) < 2.0**-120 for sums, value in zip(result.quantities, values[0], strict=True)
    )
