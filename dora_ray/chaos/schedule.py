"""Schedule of faults by step: a pure function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Live faults, injected during training; one run may take several.
LIVE = ("worker_kill", "node_kill", "drain", "join", "checkpoint_kill", "stall")
# Standalone faults, each with its own run: a sequence of world sizes, or damage between two launches.
ALONE = ("resize_path", "truncate", "corrupt_segment", "hung_decoder")
FAULTS = (*LIVE, *ALONE)
QUICK = ("worker_kill", "drain", "join")
# Worker faults, which leave nodes intact.
OF_WORKERS = ("worker_kill", "checkpoint_kill", "stall")


@dataclass(frozen=True)
class Strike:
    """Scheduled fault.

    Attributes:
        fault: its name, one of LIVE.
        step: number of steps done when it is injected.
        draw: in [0, 1), selects the worker or node.
    """

    fault: str
    step: int
    draw: float


def draw_schedule(faults: Sequence[str], *, seed: int, first: int, last: int) -> list[Strike]:
    """Schedule the faults in the given order, each in the first half of its own equal part of the steps.

    Two faults are thus at least half a part apart, so a recovery ends before the next fault.

    Args:
        faults: names; a name may occur several times.
        seed: the same seed gives the same schedule.
        first: steps done at the beginning of the first part.
        last: steps done at the end of the last part.
    """
    generator = np.random.default_rng(np.random.SeedSequence(seed))
    part = (last - first) / max(1, len(faults))
    draws = generator.random((len(faults), 2))
    return [
        Strike(fault, int(first + part * (index + 0.5 * draws[index, 0])), float(draws[index, 1]))
        for index, fault in enumerate(faults)
    ]
