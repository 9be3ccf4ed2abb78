"""Named parts of a step: profiler ranges, which a benchmark can also time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from torch.profiler import record_function

Watch = Callable[[str], AbstractContextManager[None]]
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Run the block as the named part of the step. Parts do not nest."""
    watch = _watch.get()
    with record_function(name):
        if watch is None:
            yield
            return
        with watch(name):
            yield


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Enter `watch(name)` around every part inside the block."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
