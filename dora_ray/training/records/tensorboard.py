"""TensorBoard files of a run.

tensorboardX's own SummaryWriter is not used: its writer thread dies on a full disk, and once its queue of ten values
is full, training would hang.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dora_ray import files
from dora_ray.config_source import flatten, parse_yaml

if TYPE_CHECKING:
    from PIL.Image import Image

HISTOGRAM_BINS = 64
# Measures in the table of hyperparameters: of every run, and of runs that have the given setting.
COMPARED = ("loss", "object_agreement", "object_overlap", "teacher_diversity")
MEASURED = {
    "evaluation.images": ("knn",),
    "evaluation.tour": ("j_and_f", "object_iou", "tracking_iou"),
    "evaluation.video": ("view_matching", "rankme"),
}


class Board:
    """Writes the TensorBoard file of one attempt; the first value creates it.

    If the file cannot be written, it warns once and stops writing: metrics.jsonl has the same values.

    Args:
        folder: folder of the files; may be a URI.
        warn: called with the step and a message when writing fails.
    """

    def __init__(self, folder: str, warn: Callable[[int, str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._local = folder
        self._writer: Any = None
        self._failed = False

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step and flush."""
        from tensorboardX.summary import scalar

        self._write(step, [scalar(name, value) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text verbatim: indented, because TensorBoard would render it as Markdown."""
        from tensorboardX.summary import text as summary

        self._write(step, [summary(name, "\n".join(f"    {line}" for line in text.splitlines()))])

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Add a picture."""
        from tensorboardX.proto.summary_pb2 import Summary

        content = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=png(picture)
        )
        self._write(step, [Summary(value=[Summary.Value(tag=name, image=content)])])

    def histogram(self, step: int, name: str, values: NDArray[np.float32]) -> None:
        """Add a histogram of values."""
        from tensorboardX.summary import histogram

        self._write(step, [histogram(name, values, HISTOGRAM_BINS)])

    def configuration(self, step: int, text: str) -> None:
        """Add the configuration (YAML) as text, and as the run's row in the table of hyperparameters."""
        values = flatten(parse_yaml(text, "config.yaml"))
        measured = [name for key, names in MEASURED.items() if values.get(key) is not None for name in names]
        begin, settings, _ = _hyperparameters(values, [*COMPARED, *measured])
        self.text(step, "config", text)
        self._write(step, [begin, settings])

    def done(self, step: int) -> None:
        """Mark the run as finished in the table of hyperparameters."""
        if self._writer is not None:
            self._write(step, [_hyperparameters({}, [])[2]])

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
            self._warn(step, f"{self._folder} gets nothing more until the workers' next start: {error}")

    def _open(self) -> Any:
        if self._writer is None:
            from tensorboardX.event_file_writer import EventsWriter

            if files.is_remote(self._folder):
                self._local = tempfile.mkdtemp()
            Path(self._local).mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(os.path.join(self._local, "events"))
        return self._writer

    def copy(self) -> None:
        """Upload the file if the run is in an object store, where files cannot be appended to."""
        if self._writer is not None and files.is_remote(self._folder):
            for path in Path(self._local).iterdir():
                files.write_bytes(files.join(self._folder, path.name), path.read_bytes())

    def close(self) -> None:
        """Close the file; remove the local copy if the run is in an object store."""
        if self._writer is not None:
            with suppress(OSError):  # `add` has already warned
                self._writer.close()
            if files.is_remote(self._folder):
                shutil.rmtree(self._local, ignore_errors=True)


def png(picture: Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _hyperparameters(values: Mapping[str, Any], measures: Sequence[str]) -> tuple[Any, Any, Any]:
    """Return the HParams summaries: experiment, session start, session end; lists and None become text."""
    from tensorboardX.summary import hparams

    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
    return hparams(plain, dict.fromkeys(measures))  # type: ignore[no-any-return]
