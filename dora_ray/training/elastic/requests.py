"""Requests to a training between two steps, to save now or to save and leave, and the answers.

A request is made in any one process of the worker group: by Ray Train's controller before a resize and on the notice of
a preemption (see `elastic`), or by a signal. The step's own reduction carries it to all ranks, so all act on it after
the same step. A rank that leaves waits to be ended; when nobody does, it goes on.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

# After so long a worker that has not left, whose checkpoint could not be written perhaps, is asked again.
ASK_AGAIN_SECONDS = 30.0
# How long a worker that has saved waits to be ended, counted from the deadline if there is one, before it goes on.
LEAVE_SECONDS = 60.0


class Request(IntEnum):
    """Why a checkpoint is made now. The larger one counts when several are made at once."""

    NONE = 0
    INTERVAL = 1
    NOTICE = 2
    LEAVE = 3


class Requests:
    """The requests to this process; safe to use from any thread and from a signal handler.

    Attributes:
        deadline: seconds since the epoch at which a preempted node is taken away; None: none is.
        signal: the signal that was caught.
    """

    def __init__(self) -> None:
        # One entry a kind, each set or taken in one operation: a signal may come between any two.
        self._reasons: dict[Request, str] = {}
        self._left, self._noticed, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._asked: tuple[str, float] | None = None
        self.deadline: float | None = None
        self.signal: int | None = None

    def make(self, request: Request, reason: str) -> None:
        """Ask."""
        self._reasons[request] = reason

    def pending(self) -> Request:
        """The largest request that was not taken yet."""
        return max(tuple(self._reasons), default=Request.NONE)

    def take(self, request: Request) -> str:
        """Accept all requests up to this one, which all ranks agreed upon.

        Returns:
            Its reason; its name when it was made in another process.
        """
        taken = {kind: self._reasons.pop(kind) for kind in Request if kind <= request and kind in self._reasons}
        return taken.get(request) or request.name.lower()

    def left(self) -> None:
        """Say that this process has nothing left to lose."""
        self._left.set()

    def stay(self) -> None:
        """Say that this process goes on, and has something to lose again."""
        self._left.clear()
        self._asked = None

    def leave(self, reason: str) -> bool | None:
        """Ask to leave, at once or again after a while; call it until it is over.

        Returns:
            Whether this process has left; False when its training ended instead; None before either.
        """
        if self._left.is_set() or self._ended.is_set():
            return self._left.is_set()
        now = time.monotonic()
        if self._asked is None or self._asked[0] != reason or now - self._asked[1] >= ASK_AGAIN_SECONDS:
            self.make(Request.LEAVE, reason)
            self._asked = reason, now
        return None

    def noticed(self) -> None:
        """Say that this process has missed another one, and saves what both had."""
        self._noticed.set()

    def ended(self) -> None:
        """Say that the training in this process is over, with an error perhaps."""
        self._noticed.set()
        self._ended.set()

    def wait_for_end(self, *, notice_seconds: float, seconds: float) -> bool:
        """Wait until the training here is over, if it soon notices that it cannot go on; whether it is."""
        return not self._left.is_set() and self._noticed.wait(notice_seconds) and self._ended.wait(seconds)


here = Requests()


def ask(request: Request, reason: str, deadline: float | None) -> None:
    """Make a request to this process: what the controller calls in a worker."""
    here.make(request, reason)
    here.deadline = deadline


def ask_to_leave(reason: str) -> bool | None:
    """See `Requests.leave`: what the controller calls in a worker."""
    return here.leave(reason)


def wait_for_end(notice_seconds: float, seconds: float) -> bool:
    """See `Requests.wait_for_end`: what the controller calls in a worker."""
    return here.wait_for_end(notice_seconds=notice_seconds, seconds=seconds)


def catch_signals(*signals: signal.Signals) -> None:
    """Turn signals into a request to leave; a second one ends the process at once. Call it in the main thread."""
    for number in signals:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    here.signal = number
    here.make(Request.LEAVE, signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)


@contextmanager
def caught_signals(*signals: signal.Signals) -> Iterator[None]:
    """`catch_signals` for as long as the context is open; nothing where this is not the main thread."""
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
