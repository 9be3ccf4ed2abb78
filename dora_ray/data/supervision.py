"""Watching a stream's work that may hang or die: a file server that stops answering, a decoder that never returns.

A hanging C library cannot be interrupted from Python, and may hold the interpreter's lock, so in a Ray task the whole
process is ended, by a thread that needs no interpreter; Ray then runs the task again. From the second attempt on, what
is begun is noted in the cluster's key-value store, and what ended DEATHS attempts is given up; after MOST_DEATHS so is
the rest, so that a file server that is down for good stops a run in minutes. A task that is not repeated pays nothing.
"""

from __future__ import annotations

import faulthandler
import json
from collections import Counter
from collections.abc import Container
from types import TracebackType
from typing import Any, Protocol

from dora_ray.config import DECODE_ATTEMPTS

DEATHS = 2
# With the first attempt, which notes nothing, one less than config.DECODE_ATTEMPTS.
MOST_DEATHS = DECODE_ATTEMPTS - 1
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
        """Look up what earlier attempts of this task were at when they ended.

        Args:
            seconds: the longest that an item may take.
        """
        import ray
        from ray._private.worker import global_worker

        self._seconds = seconds
        repeated = global_worker.core_worker.get_current_task_attempt_number() > 0
        # A task keeps its id when it is run again.
        self._key = f"dora_ray/begun/{ray.get_runtime_context().get_task_id()}" if repeated else ""
        self._begun: list[int] = json.loads(_store()._internal_kv_get(self._key) or "[]") if repeated else []
        deaths = Counter(self._begun)
        hopeless = deaths.total() >= MOST_DEATHS
        super().__init__(EVERYTHING if hopeless else {item for item, count in deaths.items() if count >= DEATHS})

    def __enter__(self) -> TaskWatch:
        return self

    def begin(self, item: int) -> None:
        """See `Watch`."""
        faulthandler.dump_traceback_later(self._seconds, exit=True)
        if self._key:
            _store()._internal_kv_put(self._key, json.dumps([*self._begun, item]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._key:
            _store()._internal_kv_del(self._key)


def _store() -> Any:
    """The head node's key-value store, which outlives every worker."""
    from ray.experimental import internal_kv

    return internal_kv
