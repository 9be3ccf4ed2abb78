"""Progress of a sweep: trials, and the steps within them. Its status.json, and what `dora-ray status` says of it."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dora_ray import files
from dora_ray.errors import DoRAError
from dora_ray.training.records.heartbeat import is_dead
from dora_ray.training.records.journal import STATUS, read_metrics, read_status, write_status
from dora_ray.tuning.results import trial_folder

logger = logging.getLogger(__name__)

WRITE_SECONDS = 5.0
POINTS = "trials.jsonl"
ENDS = ("done", "stopped", "failed")


@dataclass
class SweepProgress:
    """Trials and steps of a sweep, as this process sees them.

    Attributes:
        folder: the sweep's.
        trials: how many there are to be.
        steps: how many all trials have together.
        trial_steps: steps of each trial.
        reached: trial -> step that it has come to, in this process or before.
        ended: trial -> done, stopped or failed.
        waiting: trials that have begun in this process and reported no step: they start, or read their first clips.
    """

    folder: str
    trials: int
    steps: int
    trial_steps: Mapping[str, int]
    reached: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    _began: tuple[float, int] | None = None
    _written: float = 0.0

    def find(self, names: list[str], ended: Mapping[str, str]) -> None:
        """Take over what an earlier process has done, which says nothing of the speed of this one."""
        self.ended = dict(ended)
        for name in names:
            lines = [] if name in ended else read_metrics(trial_folder(self.folder, name))
            self.reached[name] = lines[-1]["step"] if lines else 0

    @property
    def steps_done(self) -> int:
        """Steps that need not be done any more; a trial that has ended needs none."""
        open_steps = sum(step for name, step in self.reached.items() if name not in self.ended)
        return open_steps + sum(self._steps_of(name) for name in self.ended)

    def _steps_of(self, name: str) -> int:
        return self.trial_steps.get(name, self.steps // max(1, self.trials))

    def start(self, name: str) -> None:
        """Note that a trial begins, or begins again."""
        self.waiting.add(name)

    def step(self, name: str, step: int) -> None:
        """Note that a trial has come to a step; what it reports again is no news."""
        self.waiting.discard(name)
        self._began = self._began or (time.monotonic(), self.steps_done)
        self.reached[name] = max(step, self.reached.get(name, 0))

    def end(self, name: str, status: str) -> None:
        """Note a trial's end."""
        self.waiting.discard(name)
        self._began = self._began or (time.monotonic(), self.steps_done)
        self.ended[name] = status

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end at the speed of this process; None before it has done anything."""
        if self._began is None:
            return None
        since, first = self._began
        done = self.steps_done
        return (self.steps - done) * (time.monotonic() - since) / (done - first) if done > first else None

    def facts(self) -> dict[str, Any]:
        """Return what status.json holds."""
        counts = Counter(self.ended.values())
        eta = self.eta_seconds
        return {
            "trials": self.trials,
            **{name: counts[name] for name in ENDS},
            "steps_done": self.steps_done,
            "steps": self.steps,
            "eta_seconds": None if eta is None else round(eta),
        }

    def write(self, state: str, running: list[str], *, force: bool = False) -> None:
        """Write status.json, at most every few seconds."""
        now = time.monotonic()
        if not force and now - self._written < WRITE_SECONDS:
            return
        self._written = now
        trials = {
            name: f"{self.reached.get(name, 0)} of {self._steps_of(name)} steps"
            + (", reading its first clips" if name in self.waiting else "")
            for name in running
        }
        try:
            write_status(self.folder, state=state, **self.facts(), running=trials)
        except (OSError, DoRAError) as error:
            logger.warning("%s cannot be written just now: %s", files.join(self.folder, STATUS), error)


def summarize_sweep(folder: str) -> dict[str, Any]:
    """Describe a sweep, in the order in which one asks; what is unknown is left out.

    Returns:
        sweep, state (starting, running, done, failed when a trial failed, interrupted, or unknown; "dead" in place of
        running when its process is gone), trials, done, stopped, failed, steps_done, steps, eta_seconds, running (trial
        -> its progress), written_seconds (since the last word).
    """
    path = files.absolute(folder)
    try:
        status = read_status(path)
    except (ValueError, TypeError):
        status = {}
    state = status.get("state", "unknown")
    if state in ("starting", "running") and is_dead(path):
        state = "dead"
    facts: dict[str, Any] = {"sweep": path, "state": state}
    facts |= {name: status.get(name) for name in ("trials", *ENDS, "steps_done", "steps")}
    if state == "running":
        facts["eta_seconds"] = status.get("eta_seconds")
        facts["running"] = status.get("running")
    if "time" in status:
        facts["written_seconds"] = round(time.time() - status["time"], 1)
    return {name: value for name, value in facts.items() if value is not None}


def read_points(folder: str) -> list[dict[str, Any]]:
    """The values of the trials that Optuna has proposed so far, in their order, seeds included."""
    path = files.join(folder, POINTS)
    if not files.exists(path):
        return []
    lines = []
    for text in files.read_text(path).splitlines():
        try:
            lines.append(json.loads(text)["values"])
        except (json.JSONDecodeError, KeyError):
            continue  # cut short by a kill
    return lines
