"""Follows a run's metrics from the process that launched it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from dora_ray import files
from dora_ray.training.journal import METRICS

POLL_SECONDS = 0.5


class MetricsTail:
    """Calls `on_metrics` with every new line of metrics.jsonl while the context is open.

    The workers may be on other machines; the run's folder is what they share with this process.
    """

    def __init__(self, run: str, on_metrics: Callable[[dict[str, Any]], None] | None) -> None:
        self._path = files.join(run, METRICS)
        self._on_metrics = on_metrics
        self._seen = len(self._text())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-tail", daemon=True)

    def __enter__(self) -> Self:
        if self._on_metrics is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._on_metrics is not None:
            self._thread.join()
            self._forward()

    def _follow(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            self._forward()

    def _text(self) -> str:
        return files.read_text(self._path) if files.exists(self._path) else ""

    def _forward(self) -> None:
        assert self._on_metrics is not None
        text = self._text()
        complete = text[self._seen : text.rfind("\n") + 1]
        self._seen += len(complete)
        for line in complete.splitlines():
            values = json.loads(line)
            if "step" in values:
                self._on_metrics(values)
