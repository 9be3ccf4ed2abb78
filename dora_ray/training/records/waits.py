"""Seconds that ranks wait for clips, sent to rank 0 with the step's own all-reduce when a metrics line is due.

W ranks, K stages for which Ray Data counts waits (none without Ray).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

EXPOSED = "exposed_wait_seconds"
MICRO = 1e-6


@dataclass
class Waits:
    """One rank's waits since the last line of metrics.

    Attributes:
        rank: this rank.
        size: W.
        blocked: returns the seconds waited so far in each of the K stages.
    """

    rank: int
    size: int
    blocked: Callable[[], dict[str, float]]
    _num_steps: int = 0
    _seconds: float = 0.0
    _before: dict[str, float] = field(default_factory=dict)
    _stages: list[str] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Add one step's wait in seconds."""
        self._num_steps += 1
        self._seconds += seconds

    def take(self) -> NDArray[np.int64]:
        """Return microseconds per step, (W * (1 + K),), zero except for this rank's, and reset."""
        now = self.blocked()
        self._stages = list(now)
        mine = [self._seconds, *(now[stage] - self._before.get(stage, 0.0) for stage in now)]
        table = np.zeros((self.size, len(mine)), np.int64)
        table[self.rank] = np.rint(np.array(mine) / self._num_steps / MICRO)
        self._num_steps, self._seconds, self._before = 0, 0.0, now
        return table.ravel()

    def values(self, total: NDArray[np.int64]) -> dict[str, float]:
        """Return the waits of the rank that waited longest, in seconds per step.

        Args:
            total: sum over ranks of the results of `take`.
        """
        table = total.reshape(self.size, -1)
        slowest = table[table[:, 0].argmax()] * MICRO
        names = [EXPOSED, *(f"blocked_{stage}_seconds" for stage in self._stages)]
        return dict(zip(names, slowest.tolist(), strict=True))
