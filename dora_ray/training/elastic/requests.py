"""Requests to a training worker between two steps: save now, or save and leave.

A request is made in any process of the worker group: by Ray Train's controller before a resize or on a preemption
notice (see `elastic`), or by a signal. The step's all-reduce carries it to all ranks, so all act on it after the same
step. A rank that leaves waits to be stopped; if nobody stops it, it continues.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

# Ask a worker again if it has not left after this long, for example because its checkpoint could not be written.
ASK_AGAIN_SECONDS = 30.0
# Time that a worker waits to be stopped after saving, or after the deadline if there is one, before it continues.
LEAVE_SECONDS = 60.0


class Request(IntEnum):
    """Request for a checkpoint, by urgency; of several at once the largest counts."""

    NONE = 0
    INTERVAL = 1
    NOTICE = 2
    LEAVE = 3


class Requests:
    """Requests to this process; safe to use from any thread and from signal handlers.

    Attributes:
        deadline: seconds since the epoch at which a preempted node goes away; None without a preemption.
        signal: the signal that was caught; None without one.
    """

    def __init__(self) -> None:
        # One entry per kind, each set or taken in one atomic operation: a signal may arrive at any point.
        self._reasons: dict[Request, str] = {}
        self._left, self._noticed, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._asked: tuple[str, float] | None = None
        self.deadline: float | None = None
        self.signal: int | None = None

    def make(self, request: Request, reason: str) -> None:
        """Add a request."""
        self._reasons[request] = reason

    def pending(self) -> Request:
        """Return the largest request that has not been taken yet."""
        return max(tuple(self._reasons), default=Request.NONE)

    def take(self, request: Request) -> str:
        """Take all requests up to this one, on which all ranks agreed.

        Returns:
            The request's reason; its name if it was made in another process.
        """
        taken = {kind: self._reasons.pop(kind) for kind in Request if kind <= request and kind in self._reasons}
        return taken.get(request) or request.name.lower()

    def left(self) -> None:
        """Signal that everything in this process is saved."""
        self._left.set()

    def stay(self) -> None:
        """Signal that this process continues training, so it has unsaved steps again."""
        self._left.clear()
        self._asked = None

    def leave(self, reason: str) -> bool | None:
        """Request to leave, and repeat the request after a while; poll until the result is not None.

        Returns:
            True once this process has left; False if its training ended instead; None before either.
        """
        if self._left.is_set() or self._ended.is_set():
            return self._left.is_set()
        now = time.monotonic()
        if self._asked is None or self._asked[0] != reason or now - self._asked[1] >= ASK_AGAIN_SECONDS:
            self.make(Request.LEAVE, reason)
            self._asked = reason, now
        return None

    def noticed(self) -> None:
        """Signal that a peer was lost and that this process is saving the steps since the last checkpoint."""
        self._noticed.set()

    def ended(self) -> None:
        """Signal that training in this process has ended, perhaps with an error."""
        self._noticed.set()
        self._ended.set()

    def wait_for_end(self, *, notice_seconds: float, seconds: float) -> bool:
        """Wait for training in this process to end; return whether it has.

        Give up early if the process has left, or does not notice the lost peer within `notice_seconds`.
        """
        return not self._left.is_set() and self._noticed.wait(notice_seconds) and self._ended.wait(seconds)


here = Requests()


def ask(request: Request, reason: str, deadline: float | None) -> None:
    """Add a request to this process; called by the controller in a worker."""
    here.make(request, reason)
    here.deadline = deadline


def ask_to_leave(reason: str) -> bool | None:
    """Call `Requests.leave` for this process; called by the controller in a worker."""
    return here.leave(reason)


def wait_for_end(notice_seconds: float, seconds: float) -> bool:
    """Call `Requests.wait_for_end` for this process; called by the controller in a worker."""
    return here.wait_for_end(notice_seconds=notice_seconds, seconds=seconds)


def catch_signals(*signals: signal.Signals) -> None:
    """Turn signals into a request to leave; a second signal kills the process. Call it in the main thread."""
    for number in signals:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    here.signal = number
    here.make(Request.LEAVE, signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)


@contextmanager
def caught_signals(*signals: signal.Signals) -> Iterator[None]:
    """Apply `catch_signals` while the context is open; do nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals}
    here.take(Request.LEAVE)  # an earlier training in this process may have left without taking it
    here.signal = None
    catch_signals(*signals)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
