"""Departure of a worker group: its workers are asked to save and leave, and Ray Train's controller does not wait.

A worker answers within milliseconds how far it is, so that health checks and Ctrl-C go on while it ends its step, an
evaluation perhaps, and saves.
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

# Time that the answers of one round are waited for; one that comes later is taken in the next round.
ANSWER_SECONDS = 0.2


class Worker(Protocol):
    """A worker of Ray Train."""

    def execute_async(self, call: Callable[..., Any], /, *arguments: Any) -> Any:
        """Call a function in the worker's process, beside its training; returns the result's reference."""


class Departure:
    """The departure of a run's worker group, by turns under way and not.

    Ray Train's scaling policy and its callbacks are pickled apart, and both need to know of it. In one process all
    copies are one object, see `departure_of`.

    Args:
        run: the run's folder, which is told how it went.

    Attributes:
        not_before: time.monotonic() until which workers train on before they are asked to leave for a resize.
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
        """Return whether workers were asked, or will be, and their group has not ended since."""
        return self._reason is not None

    def begin(self, workers: Sequence[Worker], reason: str, *, patience: float) -> None:
        """Have workers save and leave.

        Args:
            workers: in the order of their ranks.
            reason: told to the workers.
            patience: seconds that they are given once they are asked.
        """
        self._reason, self._begun, self._saved = reason, time.monotonic(), True
        self._patience, self._deadline = patience, None
        self._training, self._answers = dict(enumerate(workers)), {}

    def over(self) -> bool:
        """Ask how far the workers are; whether none trains any more, or the patience is over."""
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
        """The group is ended now: add to the run's events how the departure went."""
        seconds, saved = round(time.monotonic() - self._begun, 2), self._saved and not self._training
        note(self._run, "leave", reason=self._reason, saved=saved, seconds=seconds)
        self.cancel()

    def cancel(self) -> None:
        """The group that was to leave is gone."""
        self._reason, self._training, self._answers = None, {}, {}


@functools.cache
def departure_of(run: str) -> Departure:
    """The departure of a run in this process."""
    return Departure(run)


def note(run: str, event: str, **fields: Any) -> None:
    """Add an event to a run; where that fails it is logged.

    Ray Train ends the run where a callback of its controller raises, and a line of a log is not worth that.
    """
    try:
        add_event(run, event, **fields)
    except (OSError, DoRAError) as error:
        logger.warning("not noted: %s %s (%s)", event, fields, error)
