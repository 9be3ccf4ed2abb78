"""Slots read and segments decoded by threads of this process.

The threads are daemons: one that hangs is left behind, another takes its place, and what it was at is given up. A
decoder that hangs and holds the interpreter's lock stops the process all the same; only Ray's tasks survive that.
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

from dora_ray.data.direct import decode_segment
from dora_ray.data.plan import Plan
from dora_ray.data.segments import SegmentPlan
from dora_ray.data.slots import SlotBatch, SlotKey, read_slot
from dora_ray.data.supervision import EVERYTHING, MOST_DEATHS, Watch

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
        self._seconds = decode_seconds
        self._readers = _Threads(num_threads, "slots")
        self._decoders = _Threads(num_threads, "segments") if isinstance(plan, SegmentPlan) else None
        # An error that nobody caught keeps a stream alive until the process exits.
        atexit.register(self.close)

    def decode(self, segment: int, *, again: bool = False) -> _Job:
        """See `pipeline.Engine`."""
        plan = self._plan
        assert isinstance(plan, SegmentPlan)
        assert self._decoders is not None
        return _Job(lambda watch: decode_segment(plan, segment, watch), self._decoders, self._seconds)

    def read(self, keys: Sequence[SlotKey], segments: Mapping[int, _Job], *, again: bool = False) -> _Job:
        """See `pipeline.Engine`."""

        def work(watch: Watch) -> list[SlotBatch]:
            decoded = {number: job.result() for number, job in segments.items()}
            size = self._plan.clips_per_slot
            return [
                read_slot(self._plan, *key, decoded, watch=watch, first_item=number * size)
                for number, key in enumerate(keys)
            ]

        return _Job(work, self._readers, self._seconds)

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
    """Daemon threads that do what is put before them, first come, first served."""

    def __init__(self, count: int, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """Begin another thread."""
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Have something done."""
        self._work.put(work)

    def close(self) -> None:
        """End the threads; what waits is dropped.

        Python exits by SIGABRT while a thread is in a decoder, so they are waited for.
        """
        self._closed.set()
        for _ in self._threads:
            self._work.put(lambda: None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():  # whose garbage collection may be what closes
                thread.join(max(0.0, until - time.monotonic()))

    def closed(self) -> bool:
        """Whether what waits was dropped."""
        return self._closed.is_set()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._work.get()()


class _Job:
    """Work on one of the threads; begun again without the item that it hangs at."""

    def __init__(self, work: Callable[[Watch], Any], threads: _Threads, seconds: float) -> None:
        self._hung: set[int] = set()
        self._work = work
        self._threads = threads
        self._seconds = seconds
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        given_up = EVERYTHING if len(self._hung) >= MOST_DEATHS else frozenset(self._hung)
        self._attempt = _Attempt(given_up, self._threads.closed)
        self._threads.put(functools.partial(self._attempt.run, self._work))

    def done(self) -> bool:
        """Whether the work is done."""
        return self._attempt.future.done()

    def result(self) -> Any:
        """What the work gives, waiting for it; raises what it raises."""
        while True:
            attempt = self._attempt
            wait([attempt.future], timeout=min(LOOK_SECONDS, self._seconds))
            if attempt.future.done():
                return attempt.future.result()
            if self._threads.closed():
                raise CancelledError
            self._give_up(attempt)

    def _give_up(self, attempt: _Attempt) -> None:
        """If the attempt hangs at an item, begin another one without it, on a new thread."""
        with self._lock:
            if attempt is self._attempt and attempt.seconds_at_item() > self._seconds:
                assert attempt.item is not None
                self._hung.add(attempt.item)
                self._threads.add()
                self._start()


class _Attempt:
    """One attempt at a job; its own `supervision.Watch`."""

    def __init__(self, given_up: Container[int], closed: Callable[[], bool]) -> None:
        self.given_up = given_up
        self._closed = closed
        self.future: Future[Any] = Future()
        self.item: int | None = None
        self._begun_at = 0.0

    def run(self, work: Callable[[Watch], Any]) -> None:
        """Do the work."""
        try:
            self.future.set_result(work(self))
        except BaseException as error:  # noqa: BLE001  it is raised again by the thread that waits for the result
            self.future.set_exception(error)

    def begin(self, item: int) -> None:
        """See `Watch`. Raises CancelledError where nobody wants the work any more."""
        if self._closed():
            raise CancelledError
        self.item, self._begun_at = item, time.monotonic()

    def seconds_at_item(self) -> float:
        """How long the item at hand has taken."""
        return time.monotonic() - self._begun_at if self.item is not None else 0.0
