"""Clip stream without Ray: threads of this process read slots in the plan's order.

Threads rather than torch's DataLoader: decoding releases the GIL, so threads are no slower (152-164 clips a second
with 2 threads, 134-137 with 2 spawned workers), the first slot arrives after 0.1 s rather than 2, and a user's
script needs no `__main__` guard. The threads are daemons: a hung one is abandoned, another takes over its slot at
once, and the clip that hung is given up. A library that hangs while holding the GIL still stops the process; only
Ray tasks survive that.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Generator, Iterator

from dora_ray.clips.contents import Contents, SlotKey
from dora_ray.clips.slot import SlotBatch, read_slots
from dora_ray.config_rules import DECODE_ATTEMPTS
from dora_ray.store.hangs import EVERYTHING

LOOK_SECONDS = 0.1
# Time that closing waits for threads to finish their current clip; a hung one is abandoned.
CLOSE_SECONDS = 5.0


def local_slots(
    contents: Contents, keys: Iterator[SlotKey | None], *, prefetch: int, num_threads: int, decode_seconds: float
) -> Generator[SlotBatch, None, None]:
    """Read slots in the order of `keys`.

    Args:
        contents: readable slots of the plan.
        keys: rows of each slot, see `contents.slot_keys`.
        prefetch: slots read ahead, on top of one for each thread.
        num_threads: number of reader threads.
        decode_seconds: time limit of a clip, after which it is given up.
    """
    readers = _Readers(contents, num_threads)
    pending: deque[_Slot] = deque()
    more = True
    try:
        while more or pending:
            while more and len(pending) < prefetch + num_threads:
                try:
                    key = next(keys)
                except StopIteration:
                    more = False
                    break
                if key is None:
                    break
                pending.append(readers.begin(key))
            if not pending:
                time.sleep(LOOK_SECONDS if more else 0.0)
                continue
            while not pending[0].done.wait(min(LOOK_SECONDS, decode_seconds)):
                readers.replace_hung(decode_seconds)
            yield pending.popleft().result()
    finally:
        readers.close()


class _Readers:
    """Daemon threads that read slots in first-in, first-out order."""

    def __init__(self, contents: Contents, count: int) -> None:
        self._contents = contents
        self._waiting: queue.SimpleQueue[_Attempt | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._running: set[_Attempt] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self._add(None)

    def begin(self, key: SlotKey) -> _Slot:
        """Queue a slot for the next free thread."""
        slot = _Slot(key)
        self._waiting.put(_Attempt(slot, frozenset(), self._closed.is_set))
        return slot

    def close(self) -> None:
        """Stop the threads and wait for them: Python aborts at exit if one is still inside a decoder."""
        self._closed.set()
        for _ in self._threads:
            self._waiting.put(None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():  # garbage collection may call close from a reader
                thread.join(max(0.0, until - time.monotonic()))

    def replace_hung(self, seconds: float) -> None:
        """Abandon threads that exceed the time limit of a clip; a new thread takes over the slot of each."""
        with self._lock:
            for attempt in [attempt for attempt in self._running if attempt.seconds_at_clip() > seconds]:
                attempt.left_behind = True
                self._running.remove(attempt)
                self._add(attempt.without_clip())

    def _add(self, first: _Attempt | None) -> None:
        thread = threading.Thread(target=self._run, args=(first,), name="clips", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, attempt: _Attempt | None) -> None:
        while not self._closed.is_set():
            attempt = attempt or self._waiting.get()
            if attempt is not None and not self._read(attempt):
                return
            attempt = None

    def _read(self, attempt: _Attempt) -> bool:
        """Read a slot, retrying once if a clip was unreadable; return False if the thread was abandoned meanwhile."""
        with self._lock:
            self._running.add(attempt)
        try:
            batch: SlotBatch | BaseException = read_slots(self._contents, [attempt.slot.key], attempt)[0]
            if isinstance(batch, SlotBatch) and not batch.final:
                batch = read_slots(self._contents, [attempt.slot.key], attempt)[0]
        except BaseException as error:  # noqa: BLE001  re-raised in the consumer, by _Slot.result
            batch = error
        with self._lock:
            if attempt.left_behind:
                return False
            self._running.remove(attempt)
            attempt.slot.settle(batch)
            return True


class _Slot:
    """A slot that is being read."""

    def __init__(self, key: SlotKey) -> None:
        self.key = key
        self.done = threading.Event()
        self._outcome: SlotBatch | BaseException | None = None

    def settle(self, outcome: SlotBatch | BaseException) -> None:
        """Set the outcome and wake the consumer."""
        self._outcome = outcome
        self.done.set()

    def result(self) -> SlotBatch:
        """Return the slot's batch, or raise the error of its reading. Call once `done` is set."""
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class _LeftBehindError(Exception):
    """This thread was abandoned, or the readers were closed."""


class _Attempt:
    """One attempt to read a slot; implements `hangs.Watch`."""

    def __init__(self, slot: _Slot, hung: frozenset[int], closed: Callable[[], bool]) -> None:
        self.slot = slot
        self.given_up: Container[int] = EVERYTHING if len(hung) >= DECODE_ATTEMPTS else hung
        self.left_behind = False
        self._hung, self._closed = hung, closed
        # A single tuple, so that another thread reads it atomically.
        self._begun: tuple[int, float] | None = None

    def begin(self, item: int) -> None:
        """See `Watch`."""
        if self.left_behind or self._closed():
            raise _LeftBehindError
        self._begun = (item, time.monotonic())

    def seconds_at_clip(self) -> float:
        """Return the seconds spent on the current clip."""
        return time.monotonic() - self._begun[1] if self._begun is not None else 0.0

    def without_clip(self) -> _Attempt:
        """Return a new attempt that skips the current clip."""
        assert self._begun is not None
        return _Attempt(self.slot, self._hung | {self._begun[0]}, self._closed)
