"""Named parts of a step: ranges in a profile, and a place where a bench can hold a stopwatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch.profiler import record_function

Watch = Callable[[str], AbstractContextManager[None]]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count what runs inside as this part of the step. Parts do not nest."""
    watch = _watch.get()
    with record_function(name):
        if watch is None:
            yield
            return
        with watch(name):
            yield


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Enter `watch(name)` around every part that runs inside."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
