"""Departure of a worker group: its workers are asked to save and leave, without blocking Ray Train's controller.

A worker reports its progress within milliseconds, so health checks and Ctrl-C keep working while it finishes its step
(perhaps an evaluation) and saves.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from dora_ray.errors import DoRAError
from dora_ray.training.elastic.requests import ask_to_leave
from dora_ray.training.records.journal import add_event

logger = logging.getLogger(__name__)

# Timeout for the answers of one round; a later answer is taken in the next round.
ANSWER_SECONDS = 0.2


class Worker(Protocol):
    """A worker of Ray Train."""

    def execute_async(self, call: Callable[..., Any], /, *arguments: Any) -> Any:
        """Call a function in the worker's process while it trains; return a reference to the result."""


class Departure:
    """Departure of a run's worker group; reusable.

    Ray Train pickles its scaling policy and its callbacks separately, and both need the departure. All copies in one
    process are one object, see `departure_of`.

    Args:
        run: the run's folder; the outcome is added to its events.

    Attributes:
        not_before: time.monotonic() before which workers are not asked to leave for a resize.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self.not_before = -math.inf
        self._reason: str | None = None
        self._begun = self._patience = 0.0
        self._deadline: float | None = None
        self._training: dict[int, Worker] = {}
        self._answers: dict[int, Any] = {}
        self._saved = True

    def __reduce__(self) -> tuple[Any, ...]:
        return departure_of, (self._run,)

    @property
    def under_way(self) -> bool:
        """Return whether a departure has begun and its group has not ended yet."""
        return self._reason is not None

    def begin(self, workers: Sequence[Worker], reason: str, *, patience: float) -> None:
        """Begin to have workers save and leave.

        Args:
            workers: the workers, by rank.
            reason: reason passed to the workers.
            patience: seconds that the workers get once they are asked.
        """
        self._reason, self._begun, self._saved = reason, time.monotonic(), True
        self._patience, self._deadline = patience, None
        self._training, self._answers = dict(enumerate(workers)), {}

    def over(self) -> bool:
        """Poll the workers; return True when none is training any more or the patience has run out."""
        now = time.monotonic()
        if self._reason == "resize" and now < self.not_before:
            return False
        if self._deadline is None:
            self._deadline = now + self._patience
        for rank, worker in self._training.items():
            if rank not in self._answers:
                self._answers[rank] = worker.execute_async(ask_to_leave, self._reason)
        if self._answers:
            references = list(self._answers.values())
            answered, _ = ray.wait(references, num_returns=len(references), timeout=ANSWER_SECONDS)
            for rank in [rank for rank, reference in self._answers.items() if reference in answered]:
                self._take(rank, self._answers.pop(rank))
        return not self._training or now >= self._deadline

    def _take(self, rank: int, reference: Any) -> None:
        try:
            left = ray.get(reference)
        except RayError as error:
            logger.warning("worker %d cannot be asked to save before the %s: %s", rank, self._reason, error)
            left = False
        if left is not None:
            del self._training[rank]
            self._saved &= left

    def end(self) -> None:
        """End the departure, just before the group is stopped, and add the outcome to the run's events."""
        seconds, saved = round(time.monotonic() - self._begun, 2), self._saved and not self._training
        note(self._run, "leave", reason=self._reason, saved=saved, seconds=seconds)
        self.cancel()

    def cancel(self) -> None:
        """Cancel the departure: its group is gone."""
        self._reason, self._training, self._answers = None, {}, {}


@functools.cache
def departure_of(run: str) -> Departure:
    """Return the departure of a run in this process."""
    return Departure(run)


def note(run: str, event: str, **fields: Any) -> None:
    """Add an event to a run; log a warning if that fails.

    Ray Train ends the run if a controller callback raises, and a missing event is not worth that.
    """
    try:
        add_event(run, event, **fields)
    except (OSError, DoRAError) as error:
        logger.warning("event not recorded: %s %s (%s)", event, fields, error)
