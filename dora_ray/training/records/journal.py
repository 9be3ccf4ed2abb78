"""Files of a run beside its checkpoints: metrics.jsonl, ledger.jsonl, events.jsonl, status.json, tensorboard/.

Rank 0 writes; Ray Train's controller adds failures to the events. Every line carries its attempt, which counts the
starts of the worker group from 1. An attempt that begins at step s supersedes the earlier attempts' steps from s on;
`read_history` and `read_metrics` drop those.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from dora_ray import files
from dora_ray.checkpoints import checkpoint_name
from dora_ray.errors import DoRAError
from dora_ray.training.records.gauges import RunGauges
from dora_ray.training.records.loggers import Loggers
from dora_ray.training.records.tensorboard import Board, png

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
METRICS, EVENTS, STATUS, LEDGER, TENSORBOARD = (
    "metrics.jsonl",
    "events.jsonl",
    "status.json",
    "ledger.jsonl",
    "tensorboard",
)
# Events from processes other than rank 0 in an object store, where a file has a single writer.
OTHER_EVENTS = "events-controller.jsonl"
# Event added at launch: frames of a video are missing.
MISSING_FRAMES = "missing_frames"
PICTURES = "pictures"
LEDGER_END_BYTES = 1 << 16


def read_lines(path: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a file; empty if it is missing. A last line that a kill cut short is skipped."""
    if not files.exists(path):
        return []
    lines = []
    for text in files.read_text(path).splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def read_events(run: str) -> list[dict[str, Any]]:
    """Return all events of a run, sorted by time."""
    lines = read_lines(files.join(run, EVENTS)) + read_lines(files.join(run, OTHER_EVENTS))
    return sorted(lines, key=lambda line: float(line["time"]))


def add_event(run: str, event: str, **fields: Any) -> None:
    """Add an event from a process other than rank 0, such as Ray Train's controller or the launcher."""
    lines = files.LineFile(files.join(run, OTHER_EVENTS if files.is_remote(run) else EVENTS))
    lines.append(json.dumps({"time": time.time(), "event": event, **fields}))
    lines.flush()


def read_history(run: str) -> dict[int, list[int]]:
    """Return the slot hashes (of the decoded content, in slot order) of each step in the history of the weights."""
    return {step: line["slots"] for step, line in _survivors(read_lines(files.join(run, LEDGER))).items()}


def read_metrics(run: str) -> list[dict[str, Any]]:
    """Return the metrics lines that no later attempt superseded, by step."""
    return list(_survivors(read_lines(files.join(run, METRICS))).values())


def _survivors(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return each step's line, without those that a later attempt superseded."""
    kept: dict[int, dict[str, Any]] = {}
    for line in lines:
        if "begin" in line:
            kept = {step: old for step, old in kept.items() if step < line["begin"]}
        else:
            kept[line["step"]] = line
    return kept


class Journal:
    """Writer of a run's records during one attempt.

    Args:
        run: the run's folder.
        step: first step of the attempt.
        num_steps: steps of the whole run.
        world_size: workers of the attempt.
        entered: seconds since the epoch at which the worker's training function was called.
        last_checkpoint: name of the checkpoint that the attempt starts from.
        loggers: logging services that get the same records (`records.loggers`).
    """

    def __init__(
        self,
        run: str,
        *,
        step: int,
        num_steps: int,
        world_size: int,
        entered: float,
        last_checkpoint: str | None = None,
        loggers: Sequence[str] = (),
    ) -> None:
        self.run = run
        self._metrics = files.LineFile(files.join(run, METRICS))
        self._events = files.LineFile(files.join(run, EVENTS))
        self._ledger = files.LineFile(files.join(run, LEDGER))
        events = read_events(run)
        starts = [index for index, line in enumerate(events) if line["event"] == "start"]
        self._failures = sum(line["event"] == "failure" for line in events)
        self.attempt = len(starts) + 1
        self._num_steps, self._world_size = num_steps, world_size
        self._last_checkpoint = last_checkpoint
        self._board = Board(files.join(run, TENSORBOARD), self._warn)
        self._gauges = RunGauges(run)
        self._loggers = Loggers(run, (), self._warn)
        self._loggers = Loggers(run, loggers, self._warn)
        self._recovery = _Recovery.of(events[starts[-1] :], entered) if starts else None
        if self._recovery is not None:
            self._recovery.steps_lost = max(0, _steps_done(run) - step)
        # The ledger numbers steps from 0; a metrics line carries the number of steps done.
        self._ledger.append(json.dumps({"attempt": self.attempt, "begin": step}))
        self._metrics.append(json.dumps({"attempt": self.attempt, "begin": step + 1}))
        self.event("start", step=step, world_size=world_size, host=socket.gethostname(), pid=os.getpid())
        if starts and events[starts[-1]]["world_size"] != world_size:
            self.event("resize", step=step, before=events[starts[-1]]["world_size"], after=world_size)
        if files.exists(files.join(run, CONFIG)):
            self._board.configuration(step, files.read_text(files.join(run, CONFIG)))
        self.status("running", step)

    def stepped(self, step: int, waited: float) -> None:
        """Record a finished step; the first one after an interruption adds an event with the recovery's cost."""
        if self._recovery is None:
            return
        recovery, self._recovery = self._recovery, None
        values = recovery.ended(waited)
        self.event("recovered", step=step, **values)
        self._board.add(step, {"recovery_seconds": values["seconds"], "steps_lost": values["steps_lost"]})

    def event(self, event: str, **fields: Any) -> None:
        """Add a line to events.jsonl and flush it."""
        self._events.append(json.dumps({"time": time.time(), "event": event, "attempt": self.attempt, **fields}))
        with suppress(OSError, DoRAError):  # the line stays buffered and is written with the next one
            self._events.flush()
        self._loggers.event(event, {"attempt": self.attempt, **fields})
        if event == "end":
            self._board.done(int(fields["step"]))

    def _warn(self, step: int, message: str) -> None:
        self.event("warning", step=step, message=message)

    def ledger(self, step: int, slots: list[int]) -> None:
        """Add a step's slot hashes to the ledger."""
        self._ledger.append(json.dumps({"attempt": self.attempt, "step": step, "slots": slots}))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Add a line to metrics.jsonl, TensorBoard, Ray and the loggers, and rewrite status.json."""
        line = {"step": step, "time": time.time(), "attempt": self.attempt, "world_size": self._world_size, **values}
        self._metrics.append(json.dumps(line))
        self._gauges.set(line)
        self._board.add(step, {**values, "world_size": self._world_size})
        self._loggers.metrics(step, {**values, "world_size": self._world_size, "attempt": self.attempt})
        self.status("running", step, clips_per_second=values.get("clips_per_second"))

    def picture(self, step: int, name: str, picture: Image) -> None:
        """Save a picture in the run's folder, for the report, and send it to TensorBoard and the loggers."""
        path = f"{PICTURES}/{checkpoint_name(step)}/{name}.png"
        try:
            files.write_bytes(files.join(self.run, path), png(picture))
        except (OSError, DoRAError) as error:
            self._warn(step, f"{files.join(self.run, path)} cannot be written: {error}")
            return
        self.event("picture", step=step, name=path)
        self._board.picture(step, name, picture)
        self._loggers.picture(step, name, picture)

    def histogram(self, step: int, name: str, values: NDArray[np.float32]) -> None:
        """Send a histogram of values to TensorBoard."""
        self._board.histogram(step, name, values)

    def status(self, state: str, step: int, **fields: Any) -> None:
        """Write status.json; log a warning if that fails, so that training continues."""
        facts = {
            "state": state,
            "step": step,
            "steps": self._num_steps,
            "world_size": self._world_size,
            "attempt": self.attempt,
            "last_checkpoint": self._last_checkpoint,
            "failures": self._failures,
        }
        try:
            write_status(self.run, **facts, **fields)
        except (OSError, DoRAError) as error:
            logger.warning("%s could not be written: %s", files.join(self.run, STATUS), error)

    def checkpoint(self, name: str, step: int, *, reason: str, seconds: float, copy_seconds: float) -> None:
        """Record a complete checkpoint.

        Args:
            name: name of its folder.
            step: steps done.
            reason: reason for the checkpoint.
            seconds: time to write it, in the background.
            copy_seconds: time to copy the state, during which training paused.
        """
        self._last_checkpoint = name
        times = {"seconds": round(seconds, 4), "copy_seconds": round(copy_seconds, 4)}
        self.event("checkpoint", step=step, name=name, reason=reason, **times)
        self.flush()

    def flush(self) -> None:
        """Flush all lines."""
        for lines in (self._metrics, self._ledger, self._events):
            lines.flush()
        self._board.copy()

    def close(self) -> None:
        """Flush and close all files. A failed write must not hide the error that ends the run."""
        try:
            self.flush()
        except (OSError, DoRAError) as error:
            logger.warning("the last lines of %s could not be written: %s", self.run, error)
        self._board.close()
        self._loggers.close()


@dataclass
class _Recovery:
    """Timeline from an interruption to the first step after it, in seconds since the epoch.

    Attributes:
        noticed: Ray Train's controller saw the failure, or had the workers leave.
        grouped: the controller requested the placement of the new workers.
        entered: the new worker's training function was called.
        ready: its state was loaded.
        steps_lost: number of steps to repeat.
    """

    noticed: float
    grouped: float
    entered: float
    ready: float
    steps_lost: int = 0

    @classmethod
    def of(cls, events: list[dict[str, Any]], entered: float) -> _Recovery | None:
        """Read the recovery from the events since the workers' last start; None if nothing interrupted them.

        Events before the last launch do not count: that run had ended.
        """
        launches = [index for index, line in enumerate(events) if line["event"] == "launch"]
        events = events[launches[-1] :] if launches else events
        # A drain causes no failure: the controller only waits for the node to go away.
        noticed = [line["time"] for line in events if line["event"] in ("failure", "leave", "hold")]
        grouped = [line["time"] for line in events if line["event"] == "group"]
        if not noticed or not grouped:
            return None
        return cls(noticed[0], grouped[-1], entered, time.time())

    def ended(self, waited: float) -> dict[str, Any]:
        """Return the cost of the interruption, total and by part; `waited` is the first step's wait for clips."""
        now = time.time()
        parts = {
            "reservation": self.grouped - self.noticed,
            "worker_start": self.entered - self.grouped,
            "state": self.ready - self.entered,
            "first_batch": waited,
            "first_step": now - self.ready - waited,
        }
        rounded = {name: round(seconds, 2) for name, seconds in parts.items()}
        return {"seconds": round(now - self.noticed, 2), "steps_lost": self.steps_lost, "parts": rounded}


def _steps_done(run: str) -> int:
    """Return the steps done by earlier attempts. The ledger alone may lag: in an object store it is flushed rarely."""
    return max(_last_step(files.join(run, LEDGER)) + 1, int(read_status(run).get("step", 0)))


def _last_step(ledger: str) -> int:
    """Return the last step in the ledger, -1 if there is none. Reads only the end: a ledger can be long."""
    lines = files.read_end(ledger, LEDGER_END_BYTES).splitlines()
    for text in reversed(lines):
        try:
            return int(json.loads(text)["step"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return -1


def write_status(run: str, **fields: Any) -> None:
    """Write status.json; `dora-ray status RUN` prints it."""
    files.write_text(files.join(run, STATUS), json.dumps({"time": time.time(), **fields}, indent=1) + "\n")


def read_status(run: str) -> dict[str, Any]:
    """Return the contents of status.json; empty if there is none."""
    path = files.join(run, STATUS)
    return dict(json.loads(files.read_text(path))) if files.exists(path) else {}


class MetricsWindow:
    """Means of the measures since the last line of metrics."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._count, self._seconds = 0, 0.0
        self._values: dict[str, list[SupportsFloat]] = {}

    def add(self, measures: Mapping[str, SupportsFloat], seconds: float) -> None:
        """Add a step's measures and its duration in seconds.

        The measures are converted only in `means`, as a GPU may not have computed them yet.
        """
        self._count += 1
        self._seconds += seconds
        for name, value in measures.items():
            self._values.setdefault(name, []).append(value)

    def means(self, clips_a_step: int) -> dict[str, float]:
        """Return the means and rates since the last call, and reset."""
        # Object measures are missing in some steps.
        values = {name: sum(map(float, found)) / len(found) for name, found in self._values.items()}
        values["step_seconds"] = self._seconds / self._count
        values["clips_per_second"] = clips_a_step * self._count / self._seconds
        self._clear()
        return values
