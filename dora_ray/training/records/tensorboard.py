"""TensorBoard's files of a run.

tensorboardX's own SummaryWriter is not used: the thread in which it writes dies on a full disk, and from its eleventh
value on training would wait for that thread for ever.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dora_ray import files


class Board:
    """Writes scalars of one attempt, the file being made with the first of them.

    Where its file cannot be written it says so once and does no more: metrics.jsonl has the same values.

    Args:
        folder: where the files are to be; may be a URI.
        warn: told the step, and why nothing more is written.
    """

    def __init__(self, folder: str, warn: Callable[[int, str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._local = folder
        self._writer: Any = None
        self._failed = False

    def add(self, step: int, values: dict[str, float]) -> None:
        """Values after a step, visible at once."""
        from tensorboardX.summary import scalar

        self._write(step, [scalar(name, value) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text as it is, which TensorBoard would else read as Markdown."""
        from tensorboardX.summary import text as summary

        self._write(step, [summary(name, "\n".join(f"    {line}" for line in text.splitlines()))])

    def _write(self, step: int, summaries: list[Any]) -> None:
        if self._failed:
            return
        from tensorboardX.proto.event_pb2 import Event

        try:
            writer = self._open()
            for summary in summaries:
                writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            writer.flush()
        except OSError as error:
            self._failed = True
            self._warn(step, f"{self._folder} gets nothing more until the next start of the workers: {error}")

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX.event_file_writer import EventsWriter

            if files.is_remote(self._folder):
                self._local = tempfile.mkdtemp()
            Path(self._local).mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(os.path.join(self._local, "events"))
        return self._writer

    def copy(self) -> None:
        """Put the file where the run is, if that is an object store, in which nothing can be appended to."""
        if self._writer is not None and files.is_remote(self._folder):
            for path in Path(self._local).iterdir():
                files.write_bytes(files.join(self._folder, path.name), path.read_bytes())

    def close(self) -> None:
        """Close the file; remove the copy of one that is in an object store."""
        if self._writer is not None:
            with suppress(OSError):  # of what `add` has warned
                self._writer.close()
            if files.is_remote(self._folder):
                shutil.rmtree(self._local, ignore_errors=True)
