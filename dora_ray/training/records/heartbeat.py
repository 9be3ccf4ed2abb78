"""Heartbeat of the process that launched a run or a sweep, so that a killed one can be detected."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dora_ray import files
from dora_ray.errors import DoRAError

logger = logging.getLogger(__name__)

HEARTBEAT = "heartbeat.json"
BEAT_SECONDS, REMOTE_BEAT_SECONDS = 10.0, 30.0
# Generous, because a busy machine or a slow disk delays beats. A process on this machine is checked directly.
MISSED_BEATS = 12


class Heartbeat:
    """Writes heartbeat.json every few seconds while the context is open.

    Args:
        folder: folder or URI of the run or sweep.
    """

    def __init__(self, folder: str) -> None:
        self._path = files.join(folder, HEARTBEAT)
        self._seconds = REMOTE_BEAT_SECONDS if files.is_remote(folder) else BEAT_SECONDS
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()

    def _go_on(self) -> None:
        while not self._closing.wait(self._seconds):
            self._beat()

    def _beat(self) -> None:
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        try:
            files.write_text(self._path, json.dumps({"time": time.time(), "every": self._seconds, **process}) + "\n")
        except (OSError, DoRAError) as error:
            logger.debug("%s could not be written: %s", self._path, error)


def is_dead(folder: str) -> bool | None:
    """Return whether the process that launched the run or sweep is gone; None without a valid heartbeat file."""
    path = files.join(folder, HEARTBEAT)
    if not files.exists(path):
        return None
    try:
        beat = json.loads(files.read_text(path))
        if beat["host"] == socket.gethostname():
            return not _lives(beat["pid"], beat["started"])
        return bool(time.time() - beat["time"] > MISSED_BEATS * beat["every"])
    except (ValueError, KeyError, TypeError):
        return None


def _lives(pid: int, started: Any) -> bool:
    """Return whether the process is running, and is not another one that reuses its pid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_started(pid) == started)


def _started(pid: int) -> int | None:
    """Return the process's start time in clock ticks since boot; None for a zombie or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
