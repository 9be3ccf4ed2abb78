"""Progress of a long job: a bar on a terminal, a line in a notebook, elsewhere a log line now and then.

    with Progress("train", unit="steps") as progress:
        progress.update(step=12, total=3000, loss=5.1, clips_per_second=9.7, data_wait=0.02)

Without a terminal (batch system, container log, pipe) a line goes to this module's logger at level INFO, at most every
ten seconds and once at the end. Imports neither torch nor ray.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
REFRESH_SECONDS = 0.1
# Number of updates behind the ETA; few enough that it adapts quickly to a new number of workers.
SPEED_UPDATES = 100

Value = float | int | str | None

_FORMATS: dict[str, Callable[[Value], str]] = {
    "loss": "loss {:.4f}".format,
    "clips_per_second": "{:,.1f} clips/s".format,
    "frames_per_second": "{:,.1f} frames/s".format,
    "data_wait": "data wait {:.0%}".format,
}


class Progress:
    """Progress display of one job; a context manager, entered once.

    Attributes:
        title: name of the job, in a word or two.
        unit: plural of the counted unit: "steps", "segments".
    """

    def __init__(
        self,
        title: str,
        *,
        unit: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the display; nothing is shown before the first update.

        Args:
            title: see the attributes.
            unit: see the attributes.
            console: console of the bar; stderr by default, as stdout is for results.
            clock: returns seconds from any origin.
        """
        self.title = title
        self.unit = unit
        self._clock = clock
        # Imported here because scripts/gpu_check.py runs on machines without rich.
        from rich.console import Console

        self._console = Console(stderr=True) if console is None else console
        self._bar: RichProgress | None = None
        self._notebook: Any = None
        self._speed: deque[tuple[float, int]] = deque(maxlen=SPEED_UPDATES)
        self._pending = self._said = ""
        self._shown_at = -float("inf")

    def __enter__(self) -> Self:
        """Open the bar if the console is a terminal that can move its cursor."""
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        if not self._open_notebook() and self._console.is_terminal and not self._console.is_dumb_terminal:
            # No refresh thread: each update draws, and nothing runs in the background.
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[details]}", markup=False),
                console=self._console,
                auto_refresh=False,
            )
            self._bar.add_task(self.title, total=None, details="")
            self._bar.start()
        return self

    def _open_notebook(self) -> bool:
        """Open a text line in a notebook cell, where rich's bar would need ipywidgets."""
        if self._console.is_jupyter:
            display: Any = importlib.import_module("IPython.display")
            self._notebook = display.display({"text/plain": f"{self.title}: ..."}, raw=True, display_id=True)
        return self._notebook is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last update, even after an error, and close the bar."""
        self._show()
        if self._bar is not None:
            self._bar.stop()

    def update(self, *, step: int, total: int | None, **fields: Value) -> None:
        """Update the job's state, and show it unless the last display is too recent.

        Args:
            step: number done. It may decrease (restart from a checkpoint).
            total: total number; None if unknown.
            **fields: more values to show, in this order; None is left out. ``loss``, ``clips_per_second``,
                ``frames_per_second`` and ``data_wait`` (a share of 1) are shown with units, others as ``name value``.
        """
        remaining = self._remaining_seconds(step, total)
        details = [_count(step, total, self.unit), *_describe(fields)]
        self._said = ""
        if remaining is not None:
            details.append(f"ETA {datetime.timedelta(seconds=round(remaining))}")
        self._pending = ", ".join(details)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, total=total, details=self._pending)
        logs = self._bar is None and self._notebook is None
        if self._clock() - self._shown_at >= (LOG_SECONDS if logs else REFRESH_SECONDS):
            self._show()

    def say(self, words: str) -> None:
        """Show a text immediately, and once, instead of a count: there is nothing to count yet."""
        if words == self._said:
            return
        self._pending = self._said = words
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], details=words)
        self._show()

    def _show(self) -> None:
        if not self._pending:
            return
        if self._notebook is not None:
            self._notebook.update({"text/plain": f"{self.title}: {self._pending}"}, raw=True)
        elif self._bar is None:
            logger.info("%s: %s", self.title, self._pending)
        else:
            self._bar.refresh()
        self._pending = ""
        self._shown_at = self._clock()

    def _remaining_seconds(self, step: int, total: int | None) -> float | None:
        if self._speed and step < self._speed[-1][1]:
            self._speed.clear()
        self._speed.append((self._clock(), step))
        (first_time, first_step), (last_time, last_step) = self._speed[0], self._speed[-1]
        if total is None or last_step == first_step:
            return None
        return max(0, total - step) * (last_time - first_time) / (last_step - first_step)


class Stages:
    """Progress of successive stages; starting a stage closes the previous one."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._title = ""
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def at(self, title: str, unit: str) -> Progress:
        """Return the progress of a stage; start the stage if needed."""
        if self._progress is None or title != self._title:
            self._stack.close()
            self._progress = self._stack.enter_context(Progress(title, unit=unit))
            self._title = title
        return self._progress


def _count(step: int, total: int | None, unit: str) -> str:
    if total is None:
        return f"{step:,} {unit}"
    return f"{step:,}/{total:,} {unit}" + (f" ({step / total:.0%})" if total else "")


def _describe(fields: dict[str, Value]) -> list[str]:
    """Return a description of each field that has a value."""
    described = []
    for name, value in fields.items():
        if value is None:
            continue
        shown = f"{value:.4g}" if isinstance(value, float) else value
        words = _FORMATS[name](value) if name in _FORMATS else f"{name.replace('_', ' ')} {shown}"
        described.append(words)
    return described
