"""Reads that hang or kill their process: one policy for ingest and clip stream.

A hanging C library cannot be interrupted from Python and may hold the GIL. In a Ray task, faulthandler's own thread,
which needs no lock, therefore ends the whole process, and Ray retries the task in another one. Ray does not tell a task
how its last attempt ended, so every retry records its current item in the cluster's key-value store, which needs no
process of ours; first attempts pay nothing. An item is given up after two hangs, or after several deaths of the process
while the item was in progress. After a second item has hung twice, all remaining items are given up, so a file server
that is down for good stops a run in minutes.
"""

from __future__ import annotations

import faulthandler
import json
import time
from collections import Counter
from collections.abc import Container, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from dora_ray import ray_internals
from dora_ray.config_rules import DECODE_ATTEMPTS

NAMESPACE = "dora-ray-attempts"
HANGS = 2
# A process may be killed repeatedly for a node's memory, or lost with its node, without any item being at fault.
DEATHS, MOST_DEATHS = 5, 10
EVERYTHING = range(2**62)
# A task killed at its time limit is retried within this time. A later retry may have lost its node and waited for
# another; it is not known to have hung, so it counts as a death, and none of its items is recorded as unreadable.
RESTART_SECONDS = 60.0


class Watch(Protocol):
    """Follows work item by item, and knows the items that must not be retried."""

    given_up: Container[int]

    def begin(self, item: int) -> None:
        """Record that work on `item` begins, and that the item before it is done."""


class Unwatched:
    """Watch that does nothing."""

    hung = False

    def __init__(self, given_up: Container[int] = ()) -> None:
        self.given_up = given_up

    def begin(self, item: int) -> None:
        """See `Watch`."""


UNWATCHED = Unwatched()


class Ended(NamedTuple):
    """End of an attempt: the item in progress, and whether it exceeded its time limit."""

    item: int
    hung: bool


class TaskWatch(Unwatched):
    """Kills this process when one item of a Ray task takes too long; a context manager around the task's work.

    Exit it before the task yields, because a slow consumer is not a hang.

    Attributes:
        hung: True if an earlier attempt at this task was killed at its time limit.
    """

    def __init__(self, seconds: float) -> None:
        """Look up how earlier attempts at this task ended.

        Args:
            seconds: time limit of an item.
        """
        import ray

        self._seconds = seconds
        # A task keeps its id when it is retried.
        self._name = f"task {ray.get_runtime_context().get_task_id()}"
        self._again = ray_internals.attempt_number() > 0
        self._ended = self._look_up() if self._again else []
        self.hung = any(ended.hung for ended in self._ended)
        super().__init__(given_up(self._ended))

    def _look_up(self) -> list[Ended]:
        stored = ray_internals.get_value(self._name, namespace=NAMESPACE)
        known, last = json.loads(stored) if stored is not None else ([], None)
        ended = [Ended(*fields) for fields in known]
        if last is not None:
            item, begun = last
            # The previous attempt ended before this one began.
            ended.append(Ended(item, self._seconds <= time.time() - begun < self._seconds + RESTART_SECONDS))
            self._put(ended, None)
        return ended

    def _put(self, ended: Sequence[Ended], last: tuple[int, float] | None) -> None:
        ray_internals.put_value(self._name, json.dumps((ended, last)), namespace=NAMESPACE)

    def __enter__(self) -> Self:
        return self

    def begin(self, item: int) -> None:
        """See `Watch`."""
        faulthandler.dump_traceback_later(self._seconds, exit=True)
        if self._again:
            self._put(self._ended, (item, time.time()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._again:
            ray_internals.delete_value(self._name, namespace=NAMESPACE)


def given_up(ended: Sequence[Ended]) -> Container[int]:
    """Return the items not to be retried, given how earlier attempts at a task ended.

    The first attempt recorded nothing; it is assumed to have ended like the second.
    """
    attempts = [*ended[:1], *ended]
    hung = Counter(item for item, hangs in attempts if hangs)
    died = Counter(item for item, hangs in attempts if not hangs)
    if hung.total() >= DECODE_ATTEMPTS or died.total() >= MOST_DEATHS:
        return EVERYTHING
    return {item for item in hung | died if hung[item] >= HANGS or died[item] >= DEATHS}
