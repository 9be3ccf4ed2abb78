"""Follow a run's files from the launching process."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from dora_ray import files
from dora_ray.errors import DoRAError
from dora_ray.training.records.journal import EVENTS, METRICS, OTHER_EVENTS

logger = logging.getLogger(__name__)

OnLine = Callable[[dict[str, Any]], None]

POLL_SECONDS = 0.5
REMOTE_POLL_SECONDS = 5.0


class RunTail:
    """Forwards new lines of the run's files while the context is open; all workers write to the shared folder.

    Metrics lines go to `on_metrics`, events to `on_event`; warnings, failures and resizes are also logged.
    """

    def __init__(self, run: str, on_metrics: OnLine | None, on_event: OnLine | None = None) -> None:
        def forward(event: dict[str, Any]) -> None:
            _log_event(event)
            if on_event is not None:
                on_event(event)

        self._followed = [_Lines(files.join(run, name), forward) for name in (EVENTS, OTHER_EVENTS)]
        if on_metrics is not None:
            self._followed.append(
                _Lines(files.join(run, METRICS), lambda line: on_metrics(line) if "step" in line else None)
            )
        self._seconds = REMOTE_POLL_SECONDS if files.is_remote(run) else POLL_SECONDS
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="run-tail", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._forward()

    def _follow(self) -> None:
        while not self._closing.wait(self._seconds):
            self._forward()

    def _forward(self) -> None:
        for lines in self._followed:
            try:
                lines.forward()
            except (OSError, DoRAError) as error:
                logger.warning("%s could not be read: %s", lines.path, error)


class _Lines:
    """New lines of a JSON Lines file."""

    def __init__(self, path: str, on_line: Callable[[dict[str, Any]], None]) -> None:
        self.path = path
        self._on_line = on_line
        self._offset = len(self._read(0))

    def _read(self, offset: int) -> bytes:
        """Return the bytes from `offset` on; in an object store the whole object is read."""
        if not files.exists(self.path):
            return b""
        if files.is_remote(self.path):
            return files.read_bytes(self.path)[offset:]
        with open(self.path, "rb") as file:
            file.seek(offset, os.SEEK_SET)
            return file.read()

    def forward(self) -> None:
        """Forward the new complete lines."""
        new = self._read(self._offset)
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short by a kill
            self._on_line(values)


def _log_event(event: dict[str, Any]) -> None:
    if event["event"] == "warning":
        logger.warning("step %s: %s", event.get("step"), event["message"])
    elif event["event"] == "failure":
        logger.warning("workers %s failed: %s", event.get("ranks"), event["error"])
    elif event["event"] == "resize":
        logger.warning("step %s: %s workers instead of %s", event.get("step"), event["after"], event["before"])
