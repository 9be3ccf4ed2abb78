"""Schedule of faults by step: a pure function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Strike a run while it trains; one run may take several of them.
LIVE = ("worker_kill", "node_kill", "drain", "join", "checkpoint_kill", "stall")
# A run of its own each: a path of world sizes, or damage between two launches.
ALONE = ("resize_path", "truncate", "corrupt_segment", "hung_decoder")
FAULTS = (*LIVE, *ALONE)
QUICK = ("worker_kill", "drain", "join")
# Strike a worker and leave the nodes alone.
OF_WORKERS = ("worker_kill", "checkpoint_kill", "stall")


@dataclass(frozen=True)
class Strike:
    """One fault to come.

    Attributes:
        fault: its name, one of LIVE.
        step: number of steps done when it strikes.
        draw: in [0, 1): which of the workers or nodes is hit.
    """

    fault: str
    step: int
    draw: float


def draw_schedule(faults: Sequence[str], *, seed: int, first: int, last: int) -> list[Strike]:
    """The faults in the order given, each somewhere in the first half of its own equal part of the steps.

    So two of them are never closer than half a part, and a recovery ends before the next one strikes.

    Args:
        faults: names; a name may come more than once.
        seed: the same seed gives the same strikes.
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
