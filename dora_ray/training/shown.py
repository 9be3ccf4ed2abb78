"""Progress display of a training in the launching process: ingest, start of the workers, steps."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from dora_ray.config import Config
from dora_ray.progress import Stages
from dora_ray.store.ingest import IngestProgress
from dora_ray.training.records.waits import EXPOSED


def show_ingest(stages: Stages, state: IngestProgress) -> None:
    """Show the progress of an ingest."""
    rate = state.done_frames / state.seconds if state.seconds else None
    stages.at("ingest", "segments").update(
        step=state.done_segments, total=state.segments, frames_per_second=rate, missing=state.missing or None
    )


class TrainingProgress:
    """Progress display of one training; thread-safe.

    Args:
        config: the run's.
        enabled: show progress; False shows nothing.
    """

    def __init__(self, config: Config, *, enabled: bool) -> None:
        self._config, self._enabled = config, enabled
        self._stages, self._lock = Stages(), threading.Lock()
        self._training = False
        self._line: dict[str, Any] = {}
        self._ingested: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._enabled = False  # a background ingest may still report
            self._stages.__exit__(kind, error, trace)

    def ingest(self, state: IngestProgress) -> None:
        """Show the progress of an ingest: alone, or next to the steps once training has begun."""
        with self._lock:
            if self._enabled and not self._training:
                show_ingest(self._stages, state)
            elif self._enabled:
                self._ingested = f"{state.done_segments:,}/{state.segments:,} segments"
                self._show_steps()

    def starting(self) -> None:
        """Show that the workers are being started."""
        workers = self._config.cluster.num_workers
        most = workers if isinstance(workers, int) else workers[1]
        few = "" if isinstance(workers, int) else f"{workers[0]} to "
        with self._lock:
            self._training = True
            self._say(f"starting {few}{most} worker{'s' if most > 1 else ''}" if most else "starting in this process")

    def event(self, event: dict[str, Any]) -> None:
        """Handle a line of events.jsonl: once the workers have started, they wait for their first clips."""
        with self._lock:
            if event["event"] == "start":
                self._say("reading the first clips" if event["step"] == 0 else f"continuing from step {event['step']}")

    def metrics(self, line: dict[str, Any]) -> None:
        """Show a line of metrics."""
        with self._lock:
            self._training, self._line = True, line
            if self._enabled:
                self._show_steps()

    def _say(self, words: str) -> None:
        if self._enabled:
            self._stages.at("train", "steps").say(words)

    def _show_steps(self) -> None:
        line = self._line
        wait, seconds = line.get(EXPOSED), line.get("step_seconds")
        self._stages.at("train", "steps").update(
            step=line.get("step", 0),
            total=self._config.optim.steps,
            loss=line.get("loss"),
            clips_per_second=line.get("clips_per_second"),
            data_wait=wait / seconds if wait is not None and seconds else None,
            knn=line.get("knn"),
            ingested=self._ingested,
        )
