"""Reads that hang or end their process: one policy for ingest and clip stream.

A hanging C library cannot be interrupted from Python and may hold the interpreter's lock, so in a Ray task the whole
process is ended by faulthandler's own thread, which needs no lock; Ray then runs the task again in another process. It
tells a task nothing of how its last attempt ended, so an attempt that is not the first notes what it is at in the
cluster's key-value store, which needs no process of ours; first attempts pay nothing. An item is given up when it has
hung twice, or was at hand when the process died several times. When a second item hangs twice, so is the rest: a file
server that is down for good then stops a run in minutes.
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
# A process may be ended for a node's memory or with its node, again and again, and no item is to blame.
DEATHS, MOST_DEATHS = 5, 10
EVERYTHING = range(2**62)
# A task that is ended at its limit begins again this soon. One that begins later was lost with its node, perhaps, and
# waited for another: not known to hang, it counts as died, and nothing of it is recorded as unreadable.
RESTART_SECONDS = 60.0


class Watch(Protocol):
    """Follows work item by item, and knows the items that must not be tried again."""

    given_up: Container[int]

    def begin(self, item: int) -> None:
        """Note that work on `item` begins; the item before it is done."""


class Unwatched:
    """Work that nobody watches."""

    hung = False

    def __init__(self, given_up: Container[int] = ()) -> None:
        self.given_up = given_up

    def begin(self, item: int) -> None:
        """See `Watch`."""


UNWATCHED = Unwatched()


class Ended(NamedTuple):
    """End of an attempt: the item in progress, and whether it had run out of time."""

    item: int
    hung: bool


class TaskWatch(Unwatched):
    """Ends this process when an item of a Ray task takes too long; a context manager around the task's work.

    Leave it before the task yields: a consumer that takes its time is no hang.

    Attributes:
        hung: whether an earlier attempt at this task was ended for taking too long.
    """

    def __init__(self, seconds: float) -> None:
        """Look up how earlier attempts of this task ended.

        Args:
            seconds: the longest that an item may take.
        """
        import ray

        self._seconds = seconds
        # A task keeps its id when it is run again.
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
            # The last one ended before this one began.
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
    """Return the items not to try again, by how the earlier attempts at a task ended.

    The first attempt, which noted nothing, is taken to have ended as the second did.
    """
    attempts = [*ended[:1], *ended]
    hung = Counter(item for item, hangs in attempts if hangs)
    died = Counter(item for item, hangs in attempts if not hangs)
    if hung.total() >= DECODE_ATTEMPTS or died.total() >= MOST_DEATHS:
        return EVERYTHING
    return {item for item in hung | died if hung[item] >= HANGS or died[item] >= DEATHS}
