"""Ends a process that decodes for too long, and remembers how the earlier attempts at the same work ended.

A decoder that hangs may hold the interpreter's lock, so that no Python thread can end it: faulthandler's own thread
needs no lock. Ray then runs the task again in another process, and has no count of it that could be asked; the count is
kept in the cluster's own key-value store, which needs no process of ours.
"""

from __future__ import annotations

import faulthandler
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True)
class Attempts:
    """How the attempts before this one ended: `hung` at their limit, or `died` before it; `began`: Unix time."""

    hung: int = 0
    died: int = 0
    began: float = 0.0


def begin_attempt(work: str, *, limit_seconds: float) -> Attempts:
    """Note that an attempt at the work of that name begins in this Ray task, and tell how the earlier ones ended."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    stored, now = _internal_kv_get(work, namespace=NAMESPACE), time.time()
    attempts = Attempts(began=now)
    if stored is not None:
        last = Attempts(**json.loads(stored))
        hung = limit_seconds <= now - last.began < limit_seconds + RESTART_SECONDS
        attempts = Attempts(last.hung + hung, last.died + (not hung), now)
    _internal_kv_put(work, json.dumps(asdict(attempts)), overwrite=True, namespace=NAMESPACE)
    return attempts


def end_attempt(work: str) -> None:
    """The attempt came to its end."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(work, namespace=NAMESPACE)
