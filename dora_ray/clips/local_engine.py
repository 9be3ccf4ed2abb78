"""Slots read and segments decoded by threads of this process.

The threads are daemons: one that hangs is left behind, another takes over its job at once, and what it was at is given
up. Whoever waits for a job looks at all that run, since a hung one may be in its way. A decoder that hangs and holds
the interpreter's lock stops the process all the same; only Ray's tasks survive that.
"""

from __future__ import annotations

import atexit
import functools
import queue
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any

from dora_ray.clips.direct import decode_segment
from dora_ray.clips.plan import Plan
from dora_ray.clips.segments import SegmentPlan
from dora_ray.clips.slot import SlotBatch, SlotKey, read_slots
from dora_ray.config_rules import DECODE_ATTEMPTS
from dora_ray.store.supervision import EVERYTHING, Watch

LOOK_SECONDS = 1.0
# How long closing waits for threads to end what they are at, a frame or a clip; one that hangs takes longer.
CLOSE_SECONDS = 5.0


class LocalEngine:
    """See `pipeline.Engine`; handles are jobs. Segments have threads of their own, so that they delay no slot."""

    def __init__(self, plan: Plan, *, num_threads: int, decode_seconds: float) -> None:
        """Begin the threads.

        Args:
            plan: the plan.
            num_threads: threads that read slots, and as many that decode segments.
            decode_seconds: the longest that a clip or a frame may take before it is given up.
        """
        self._plan = plan
        self._num_threads = num_threads
        self._readers = _Threads(num_threads, "slots", decode_seconds)
        self._decoders = _Threads(num_threads, "segments", decode_seconds) if isinstance(plan, SegmentPlan) else None
        # An error that nobody caught keeps a stream alive until the process exits.
        atexit.register(self.close)

    def decode(self, segment: int, *, again: bool = False) -> _Job:
        """See `pipeline.Engine`."""
        plan = self._plan
        assert isinstance(plan, SegmentPlan)
        assert self._decoders is not None
        return _Job(lambda watch: decode_segment(plan, segment, watch), self._decoders)

    def read(self, keys: Sequence[SlotKey], segments: Mapping[int, _Job], *, again: bool = False) -> _Job:
        """See `pipeline.Engine`."""

        def work(watch: Watch) -> list[SlotBatch]:
            decoded = {number: job.result() for number, job in segments.items()}
            return read_slots(self._plan, keys, decoded, watch)

        return _Job(work, self._readers)

    def result(self, handle: _Job) -> list[SlotBatch]:
        """See `pipeline.Engine`."""
        batches: list[SlotBatch] = handle.result()
        return batches

    def unfinished(self, handles: list[_Job]) -> list[_Job]:
        """See `pipeline.Engine`."""
        return [job for job in handles if not job.done()]

    def capacity(self) -> int:
        """See `pipeline.Engine`."""
        return self._num_threads

    def close(self) -> None:
        """See `pipeline.Engine`."""
        atexit.unregister(self.close)
        # First those that the readers may be waiting for.
        if self._decoders is not None:
            self._decoders.close()
        self._readers.close()


class _Threads:
    """Daemon threads that do jobs, first come, first served; a job that hangs goes on without the item it hangs at."""

    def __init__(self, count: int, name: str, seconds: float) -> None:
        self._name = name
        self._seconds = seconds
        self._waiting: queue.SimpleQueue[_Attempt | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._running: set[_Attempt] = set()
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self._add(None)

    def put(self, attempt: _Attempt) -> None:
        """Have an attempt made by the next free thread."""
        self._waiting.put(attempt)

    def wait(self, future: Future[Any]) -> Any:
        """What a job gives; raises what it raises."""
        while not future.done():
            if self.closed():
                raise CancelledError
            self._replace_hung()
            wait([future], timeout=min(LOOK_SECONDS, self._seconds))
        return future.result()

    def close(self) -> None:
        """End the threads; what waits is dropped.

        Python exits by SIGABRT while a thread is in a decoder, so they are waited for.
        """
        self._closed.set()
        for _ in self._threads:
            self._waiting.put(None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():  # whose garbage collection may be what closes
                thread.join(max(0.0, until - time.monotonic()))

    def closed(self) -> bool:
        """Whether what waits was dropped."""
        return self._closed.is_set()

    def _add(self, first: _Attempt | None) -> None:
        """Begin another thread, with that attempt."""
        thread = threading.Thread(target=self._run, args=(first,), name=self._name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, attempt: _Attempt | None) -> None:
        while not self._closed.is_set():
            attempt = attempt or self._waiting.get()
            if attempt is not None and not self._finish(attempt):
                return
            attempt = None

    def _finish(self, attempt: _Attempt) -> bool:
        """Make an attempt; whether its thread was not left behind meanwhile."""
        with self._lock:
            self._running.add(attempt)
        settle = attempt.run()
        with self._lock:
            if attempt.left_behind:
                return False
            self._running.remove(attempt)
            settle()
            return True

    def _replace_hung(self) -> None:
        """Leave threads behind that are at an item for too long: a new one each takes over their job."""
        with self._lock:
            for attempt in [attempt for attempt in self._running if attempt.seconds_at_item() > self._seconds]:
                attempt.left_behind = True
                self._running.remove(attempt)
                self._add(attempt.next())


class _Job:
    """Work on one of the threads."""

    def __init__(self, work: Callable[[Watch], Any], threads: _Threads) -> None:
        self._threads = threads
        self._future: Future[Any] = Future()
        threads.put(_Attempt(work, self._future, threads.closed))

    def done(self) -> bool:
        """Whether the work is done."""
        return self._future.done()

    def result(self) -> Any:
        """What the work gives, waiting for it; raises what it raises."""
        return self._threads.wait(self._future)


class _Attempt:
    """One attempt at a job; its own `supervision.Watch`."""

    def __init__(
        self,
        work: Callable[[Watch], Any],
        future: Future[Any],
        closed: Callable[[], bool],
        hung: frozenset[int] = frozenset(),
    ) -> None:
        self.given_up: Container[int] = EVERYTHING if len(hung) >= DECODE_ATTEMPTS else hung
        self.left_behind = False
        self._work = work
        self._future = future
        self._closed = closed
        self._hung = hung
        # In one piece, since another thread reads it.
        self._begun: tuple[int, float] | None = None

    def run(self) -> Callable[[], None]:
        """Do the work; returns what tells its outcome to whoever waits."""
        try:
            result = self._work(self)
        except BaseException as error:  # noqa: BLE001  it is raised again by the thread that waits for the result
            return functools.partial(self._future.set_exception, error)
        return functools.partial(self._future.set_result, result)

    def next(self) -> _Attempt:
        """The attempt without what this one hangs at."""
        assert self._begun is not None
        return _Attempt(self._work, self._future, self._closed, self._hung | {self._begun[0]})

    def begin(self, item: int) -> None:
        """See `Watch`. Raises CancelledError where nobody wants the work any more."""
        if self.left_behind or self._closed():
            raise CancelledError
        self._begun = (item, time.monotonic())

    def seconds_at_item(self) -> float:
        """How long the item at hand has taken."""
        return time.monotonic() - self._begun[1] if self._begun is not None else 0.0
