"""Watching a stream's work that may hang or die: a file server that stops answering, a decoder that never returns.

A hanging C library cannot be interrupted from Python, so in a Ray task the whole process is ended (watchdog); Ray then
runs the task again. An item is given up when it has hung twice, or has been at hand when the process died several
times; when a second item hangs twice so is the rest, so that a file server that is down for good stops a run in
minutes. Only a task that is repeated notes what it is at: the others pay nothing.
"""

from __future__ import annotations

import faulthandler
from collections import Counter
from collections.abc import Container, Sequence
from types import TracebackType
from typing import Protocol

from dora_ray.config_rules import DECODE_ATTEMPTS
from dora_ray.ray_internals import attempt_number
from dora_ray.store.watchdog import Attempts, Ended

HANGS = 2
# A process may be ended for a node's memory or with its node, again and again, and no item is to blame.
DEATHS, MOST_DEATHS = 5, 10
EVERYTHING = range(2**62)


class Watch(Protocol):
    """What work tells of its progress, item by item, and the items that it is not to try again."""

    given_up: Container[int]

    def begin(self, item: int) -> None:
        """Item `item` is begun, the one before it is done."""


class Unwatched:
    """Work that nobody watches."""

    def __init__(self, given_up: Container[int] = ()) -> None:
        self.given_up = given_up

    def begin(self, item: int) -> None:
        """See `Watch`."""


UNWATCHED = Unwatched()


class TaskWatch(Unwatched):
    """Ends this process when an item of a Ray task takes too long; a context manager around the task's work."""

    def __init__(self, seconds: float) -> None:
        """Look up how earlier attempts of this task ended.

        Args:
            seconds: the longest that an item may take.
        """
        import ray

        self._seconds = seconds
        self._attempts: Attempts | None = None
        if attempt_number() > 0:
            # A task keeps its id when it is run again.
            self._attempts = Attempts(f"task {ray.get_runtime_context().get_task_id()}", limit_seconds=seconds)
        super().__init__(given_up(self._attempts.ended) if self._attempts else ())

    def __enter__(self) -> TaskWatch:
        return self

    def begin(self, item: int) -> None:
        """See `Watch`."""
        faulthandler.dump_traceback_later(self._seconds, exit=True)
        if self._attempts:
            self._attempts.note(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._attempts:
            self._attempts.forget()


def given_up(ended: Sequence[Ended]) -> Container[int]:
    """The items that are not tried again after attempts at a task that ended so, the second one and those after it.

    The first attempt, which noted nothing, is taken to have ended as the second did.
    """
    attempts = [*ended[:1], *ended]
    hung = Counter(item for item, hangs in attempts if hangs)
    died = Counter(item for item, hangs in attempts if not hangs)
    if hung.total() >= DECODE_ATTEMPTS or died.total() >= MOST_DEATHS:
        return EVERYTHING
    return {item for item in hung | died if hung[item] >= HANGS or died[item] >= DEATHS}
