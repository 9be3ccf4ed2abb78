"""Printing: results to standard output, progress to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dora_ray import files
from dora_ray.errors import ConfigError

if TYPE_CHECKING:
    from dora_ray.progress import Progress
    from dora_ray.store.ingest import IngestProgress


def write(text: str) -> None:
    """To standard output, with a line end."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def write_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, aligned."""
    width = max((len(name) for name in facts), default=0)
    write("\n".join(f"{name:<{width}}  {_plain(value)}" for name, value in facts.items()))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return str(value)


def write_json(path: str | None, content: Any) -> None:
    """To the file that --json names, if any."""
    if path is not None:
        try:
            files.write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {path} cannot be written: {error.strerror or error}") from error


class Stages:
    """Progress of one stage after the other: the first update of the next one closes the last."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._title = ""
        self._progress: Progress | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def at(self, title: str, unit: str) -> Progress:
        """The progress of a stage, which begins if it has not."""
        from dora_ray.progress import Progress

        if self._progress is None or title != self._title:
            self._stack.close()
            self._progress = self._stack.enter_context(Progress(title, unit=unit))
            self._title = title
        return self._progress

    def ingest(self, state: IngestProgress) -> None:
        """Show the progress of an ingest."""
        rate = state.done_frames / state.seconds if state.seconds else None
        self.at("ingest", "segments").update(
            step=state.done_segments, total=state.segments, frames_per_second=rate, missing=state.missing or None
        )

    def train(self, num_steps: int) -> Callable[[dict[str, Any]], None]:
        """Return a callback that shows a training's progress from its lines of metrics."""

        def update(line: dict[str, Any]) -> None:
            wait, seconds = line.get("data_wait_seconds"), line.get("step_seconds")
            self.at("train", "steps").update(
                step=line["step"],
                total=num_steps,
                loss=line.get("loss"),
                clips_per_second=line.get("clips_per_second"),
                data_wait=wait / seconds if wait is not None and seconds else None,
                knn=line.get("knn"),
            )

        return update
