"""What a run writes beside its checkpoints: metrics.jsonl, ledger.jsonl, events.jsonl, status.json, tensorboard/.

Rank 0 writes; Ray Train's controller adds failures to the events. Every line carries its attempt (1, 2, ...: each start
of the worker group is one). An attempt that begins at step s takes back the steps from s on of the attempts before it;
`read_history` and `read_metrics` apply that.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from dora_ray import files

METRICS, EVENTS, STATUS, LEDGER, TENSORBOARD = (
    "metrics.jsonl",
    "events.jsonl",
    "status.json",
    "ledger.jsonl",
    "tensorboard",
)


def read_lines(path: str) -> list[dict[str, Any]]:
    """The JSON lines of a file; none when it is missing. A last line that a kill cut short is left out."""
    if not files.exists(path):
        return []
    lines = []
    for text in files.read_text(path).splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def read_history(run: str) -> dict[int, list[int]]:
    """For each step that the weights have seen, the hashes of its slots' content: what was decoded, in slot order."""
    return {step: line["slots"] for step, line in _survivors(read_lines(files.join(run, LEDGER))).items()}


def read_metrics(run: str) -> list[dict[str, Any]]:
    """The metrics lines that survived, by step."""
    return list(_survivors(read_lines(files.join(run, METRICS))).values())


def _survivors(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The lines of each step that no later attempt has taken back."""
    kept: dict[int, dict[str, Any]] = {}
    for line in lines:
        if "begin" in line:
            kept = {step: old for step, old in kept.items() if step < line["begin"]}
        else:
            kept[line["step"]] = line
    return kept


class Journal:
    """The writer of one attempt.

    Args:
        run: the run's folder.
        step: step that the attempt begins at.
        num_steps: steps of the whole run.
        world_size: workers of the attempt.
        last_checkpoint: name of the checkpoint that the attempt begins from.
    """

    def __init__(
        self, run: str, *, step: int, num_steps: int, world_size: int, last_checkpoint: str | None = None
    ) -> None:
        self.run = run
        self._metrics = files.LineFile(files.join(run, METRICS))
        self._events = files.LineFile(files.join(run, EVENTS))
        self._ledger = files.LineFile(files.join(run, LEDGER))
        events = read_lines(self._events.path)
        earlier = [line for line in events if line["event"] == "start"]
        self._failures = sum(line["event"] == "failure" for line in events)
        self.attempt = len(earlier) + 1
        self._num_steps, self._world_size = num_steps, world_size
        self._last_checkpoint = last_checkpoint
        self._board: Any = None
        self._board_folder = ""
        # The ledger counts steps from 0; a line of metrics carries the number of steps done.
        self._ledger.append(json.dumps({"attempt": self.attempt, "begin": step}))
        self._metrics.append(json.dumps({"attempt": self.attempt, "begin": step + 1}))
        self.event("start", step=step, world_size=world_size, host=socket.gethostname(), pid=os.getpid())
        if earlier and earlier[-1]["world_size"] != world_size:
            self.event("resize", step=step, before=earlier[-1]["world_size"], after=world_size)

    def event(self, event: str, **fields: Any) -> None:
        """One line of events.jsonl, visible at once."""
        self._events.append(json.dumps({"time": time.time(), "event": event, "attempt": self.attempt, **fields}))
        self._events.flush()

    def ledger(self, step: int, slots: list[int]) -> None:
        """What every slot of a step was made of."""
        self._ledger.append(json.dumps({"attempt": self.attempt, "step": step, "slots": slots}))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same to TensorBoard, and a fresh status.json."""
        line = {"step": step, "time": time.time(), "attempt": self.attempt, "world_size": self._world_size, **values}
        self._metrics.append(json.dumps(line))
        board = self._open_board()
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.add_scalar("world_size", self._world_size, step)
        self.status("running", step, clips_per_second=values.get("clips_per_second"))

    def _open_board(self) -> Any:
        if self._board is None:
            from tensorboardX import SummaryWriter

            remote = files.is_remote(self.run)
            self._board_folder = tempfile.mkdtemp() if remote else files.join(self.run, TENSORBOARD)
            self._board = SummaryWriter(logdir=self._board_folder, flush_secs=10)
        return self._board

    def _copy_board(self) -> None:
        """TensorBoard's writer appends, which an object store cannot: there its files are put again at every flush."""
        if self._board is None or not files.is_remote(self.run):
            return
        self._board.flush()
        for path in Path(self._board_folder).iterdir():
            files.write_bytes(files.join(self.run, TENSORBOARD, path.name), path.read_bytes())

    def status(self, state: str, step: int, **fields: Any) -> None:
        """Write status.json."""
        write_status(
            self.run,
            state=state,
            step=step,
            steps=self._num_steps,
            world_size=self._world_size,
            attempt=self.attempt,
            last_checkpoint=self._last_checkpoint,
            failures=self._failures,
            **fields,
        )

    def checkpoint(self, name: str, step: int, seconds: float) -> None:
        """A checkpoint is complete; `seconds` is what writing took beside the training."""
        self._last_checkpoint = name
        self.event("checkpoint", step=step, name=name, seconds=round(seconds, 3))
        self.flush()

    def flush(self) -> None:
        """Make all lines visible."""
        for lines in (self._metrics, self._ledger, self._events):
            lines.flush()
        self._copy_board()

    def close(self) -> None:
        """Flush, and close TensorBoard's file."""
        self.flush()
        if self._board is not None:
            self._board.close()
            if files.is_remote(self.run):
                shutil.rmtree(self._board_folder, ignore_errors=True)


def write_status(run: str, **fields: Any) -> None:
    """Write status.json; `dora-ray status RUN` prints it."""
    files.write_text(files.join(run, STATUS), json.dumps({"time": time.time(), **fields}, indent=1) + "\n")


def collapse_warnings(metrics: dict[str, float], *, num_outputs: int, num_images: int) -> list[str]:
    """Sentences that name a collapse which the measures show; none when training looks alive.

    Args:
        metrics: measures of one metrics line.
        num_outputs: O.
        num_images: teacher views a slot, which bound the diversity.
    """
    warnings = []
    if metrics["teacher_entropy"] > 0.99 * math.log(num_outputs):
        warnings.append(
            "the teacher's output is almost uniform over all outputs: lower loss.teacher_temperature or optim.lr"
        )
    if metrics["teacher_diversity"] < 0.01 * math.log(min(num_images, num_outputs)):
        warnings.append(
            "the teacher gives every image the same output: raise loss.teacher_temperature or lower "
            "loss.center_momentum"
        )
    if metrics.get("object_overlap", 0.0) > 0.95:
        warnings.append(
            "the objects of a clip are almost the same patches: raise tracking.num_iterations or lower "
            "tracking.num_objects"
        )
    return warnings


class MetricsWindow:
    """Means of the measures since the last line of metrics."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._count, self._waited, self._seconds = 0, 0.0, 0.0
        self._sums: dict[str, float] = {}

    def add(self, measures: dict[str, float], waited: float, seconds: float) -> None:
        """Count one step: its measures, the seconds it waited for data, the seconds it took."""
        self._count += 1
        self._waited += waited
        self._seconds += seconds
        for name, value in measures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self, clips_a_step: int) -> dict[str, float]:
        """The means since the last call, with the rates, and begin again."""
        values = {name: total / self._count for name, total in self._sums.items()}
        values["step_seconds"] = self._seconds / self._count
        values["data_wait_seconds"] = self._waited / self._count
        values["clips_per_second"] = clips_a_step * self._count / self._seconds
        self._clear()
        return values
