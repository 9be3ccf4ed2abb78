"""Sums over slots and ranks that do not depend on the order of additions.

The masks of DoRA are hard thresholds: a difference in the last bit of a gradient sum can flip a patch and grow. `exact`
therefore adds in fixed point. A quantity x (a gradient, the teacher's output sum, the measures) whose largest element
was below 2^e in the last step is added as round(x * 2^(46 - e)) in int64. Integer addition is associative, so the sum
is the same for every number of ranks and every assignment of slots to ranks. 46 bits keep far more than float32's 24
and leave 17 for growth and for the number of slots. If a sum overflows, all ranks see it in the same reduction, raise e
and repeat the step. `float32` adds floats, which are cheaper to send.

Each step needs one flat all-reduce: integer records first, then the quantities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dora_ray.method.upload import upload

FRACTION_BITS = 46
HEADROOM_BITS = 62
FIRST_EXPONENT = 0
RETRY_BITS = 16
# A smaller exponent would take the scale out of float32's range. Smaller values lose only bits they lack there too.
LEAST_EXPONENT = -80

AllReduce = Callable[[Tensor], None]
Reduction = Literal["exact", "float32"]


class SlotSums:
    """Accumulator for the sums of one step.

    Args:
        sizes: number of elements of each quantity.
        num_records: number of integers sent along; each rank sets its own and gets the sum over ranks.
        num_slots: S, which sets the headroom.
        reduction: exact or float32.
        exponents: (Q,) int32 on the CPU, from the last step; see `next_exponents`.
        device: device of the quantities.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        num_records: int,
        num_slots: int,
        reduction: Reduction,
        exponents: Tensor,
        device: torch.device,
    ) -> None:
        self.sizes = list(sizes)
        self.num_records = num_records
        self.exponents = exponents
        self._exact = reduction == "exact"
        count = len(self.sizes)
        header, size = 2 * count + num_records, sum(self.sizes)
        self._flat = torch.zeros(header + (size if self._exact else 0), dtype=torch.int64, device=device)
        self._records = self._flat[:header]
        body = self._flat[header:] if self._exact else torch.zeros(size, device=device)
        self._body = list(body.split(self.sizes))
        self._whole_body = body
        # A GPU prefers few large operations; on a CPU each quantity should stay in cache.
        self._together = device.type == "cuda"
        self._scales = [2.0 ** (FRACTION_BITS - int(exponent)) for exponent in exponents]
        limit = torch.tensor([2.0**HEADROOM_BITS / num_slots / scale for scale in self._scales], dtype=torch.float64)
        self._limits = upload(limit, device)

    def add(self, quantities: Sequence[Tensor]) -> None:
        """Add one slot's quantities, given in the order of `sizes`."""
        quantities, count = [quantity.detach() for quantity in quantities], len(self.sizes)
        largest = largest_of(quantities).double()
        self._records[:count] += ~torch.isfinite(largest)
        if not self._exact:
            for total, quantity in zip(self._body, quantities, strict=True):
                total.add_(quantity.reshape(-1))
            return
        self._records[count : 2 * count] += largest >= self._limits
        # Exact in float32: the scale is a power of two, and above 2^24 all float32 values are integers.
        if self._together:
            scaled = torch._foreach_mul(quantities, self._scales)
            torch._foreach_round_(scaled)
            self._whole_body += torch.cat([quantity.reshape(-1) for quantity in scaled]).to(torch.int64)
            return
        for total, quantity, scale in zip(self._body, quantities, self._scales, strict=True):
            total.add_((quantity.reshape(-1) * scale).round_().to(torch.int64))

    def set_records(self, values: Tensor) -> None:
        """Set this rank's integers, (num_records,) int64."""
        self._records[2 * len(self.sizes) :] = upload(values, self._records.device)

    def all_reduce(self, all_reduce: AllReduce | None) -> SumResult:
        """Add over the ranks (None: a single rank) and convert back to float32."""
        if all_reduce is not None and self._exact:
            all_reduce(self._flat)
        elif all_reduce is not None:
            all_reduce(self._records)
            all_reduce(self._whole_body)
        # Queue the conversion before the host waits for the records, so that a GPU stays busy.
        quantities = self._body
        if self._exact and self._together:
            quantities = list(self._whole_body.float().split(self.sizes))
            torch._foreach_div_(quantities, self._scales)
        elif self._exact:
            quantities = [total.float().div_(scale) for total, scale in zip(self._body, self._scales, strict=True)]
        # The only host-device sync of a step: `largest` comes along with the records, its bits viewed as integers.
        largest, count = largest_of(quantities).double(), len(self.sizes)
        records, bits = torch.cat([self._records, largest.view(torch.int64)]).cpu().split([len(self._records), count])
        return SumResult(
            quantities,
            bits.view(torch.float64).float(),
            records[:count],
            records[count : 2 * count],
            records[2 * count :],
        )


class SumResult:
    """Result of the reduction, the same on every rank.

    Attributes:
        quantities: flat float32 sums over all slots.
        largest: (Q,) the largest absolute value of each, on the CPU.
        not_finite: (Q,) number of slots with a value that is not finite.
        overflowed: (Q,) number of slots with a value too large for its scale.
        records: (num_records,) int64 sums over ranks.
    """

    def __init__(
        self, quantities: list[Tensor], largest: Tensor, not_finite: Tensor, overflowed: Tensor, records: Tensor
    ) -> None:
        self.quantities = quantities
        self.largest = largest
        self.not_finite = not_finite
        self.overflowed = overflowed
        self.records = records


def largest_of(quantities: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value of each quantity, (Q,); 0 if it is empty, NaN if it contains NaN."""
    return torch.stack(torch._foreach_norm([q if q.numel() else q.new_zeros(1) for q in quantities], math.inf))


def next_exponents(largest: Tensor, exponents: Tensor, *, first: bool) -> Tensor:
    """Return the (Q,) exponents of the next step from the largest values of this step's sums, all on the CPU.

    They depend on the history alone, so they are equal on all ranks. An exponent grows at once but shrinks by at most
    one a step, so that one small gradient does not narrow the range. A quantity that is zero keeps its exponent.
    """
    seen = torch.frexp(largest).exponent.to(torch.int32)
    if not first:
        seen = torch.maximum(seen, exponents - 1)
    return torch.where(largest > 0, seen.clamp(min=LEAST_EXPONENT), exponents)


def raised_exponents(exponents: Tensor, overflowed: Tensor) -> Tensor:
    """Return the exponents for repeating a step in which some quantities outgrew their scale."""
    return torch.where(overflowed > 0, exponents + RETRY_BITS, exponents)
