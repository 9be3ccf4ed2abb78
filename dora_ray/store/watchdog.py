"""Ends a process that decodes for too long, and remembers how the earlier attempts at the same work ended.

A decoder that hangs may hold the interpreter's lock, so that no Python thread can end it: faulthandler's own thread
needs no lock. Ray then runs the task again in another process, and tells it nothing of how the last one ended; what an
attempt is at is noted in the cluster's own key-value store, which needs no process of ours.
"""

from __future__ import annotations

import faulthandler
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dora_ray.ray_internals import delete_value, get_value, put_value

NAMESPACE = "dora-ray-attempts"
# A task that is ended at its limit begins again this soon. One that begins later was lost with its node, perhaps, and
# waited for another: not known to hang, it counts as died, and nothing of it is recorded as unreadable.
RESTART_SECONDS = 60.0


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process, with a traceback on its standard error, unless the block ends within `seconds`."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Ended(NamedTuple):
    """How an attempt ended: what it was at, and whether that had taken as long as it may."""

    item: int
    hung: bool


class Attempts:
    """One more attempt at some work, and how those before it ended; none of this needs to be told by who was ended.

    Attributes:
        ended: the earlier ones, in order, that had noted what they were at.
    """

    def __init__(self, work: str, *, limit_seconds: float) -> None:
        """Look up the earlier attempts.

        Args:
            work: its name, unique in the cluster.
            limit_seconds: the longest that an item may take.
        """
        self._work = work
        stored = get_value(work, namespace=NAMESPACE)
        known, last = json.loads(stored) if stored is not None else ([], None)
        self.ended = [Ended(*fields) for fields in known]
        if last is not None:
            item, begun = last
            # The last one ended before this one began.
            hung = limit_seconds <= time.time() - begun < limit_seconds + RESTART_SECONDS
            self.ended.append(Ended(item, hung))
            self._put(None)

    def note(self, item: int = 0) -> None:
        """This attempt is at that item from now on."""
        self._put((item, time.time()))

    def forget(self) -> None:
        """The work is done."""
        delete_value(self._work, namespace=NAMESPACE)

    def _put(self, last: tuple[int, float] | None) -> None:
        put_value(self._work, json.dumps((self.ended, last)), namespace=NAMESPACE)
