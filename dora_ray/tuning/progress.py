"""Progress of a sweep in trials and steps: its status.json, and the summary for `dora-ray status`."""

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
    """Progress of a sweep, as seen by this process.

    Attributes:
        folder: the sweep's folder.
        trials: total number of trials.
        steps: total number of steps of all trials.
        trial_steps: steps of each trial.
        reached: trial -> last step reached, in this process or an earlier one.
        ended: trial -> done, stopped or failed.
        waiting: trials that have started in this process but reported no step yet.
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
        """Load the progress of earlier processes; it does not count towards this process's speed."""
        self.ended = dict(ended)
        for name in names:
            lines = [] if name in ended else read_metrics(trial_folder(self.folder, name))
            self.reached[name] = lines[-1]["step"] if lines else 0

    @property
    def steps_done(self) -> int:
        """Number of steps done; a trial that has ended counts in full."""
        open_steps = sum(step for name, step in self.reached.items() if name not in self.ended)
        return open_steps + sum(self._steps_of(name) for name in self.ended)

    def _steps_of(self, name: str) -> int:
        return self.trial_steps.get(name, self.steps // max(1, self.trials))

    def start(self, name: str) -> None:
        """Record that a trial has started or restarted."""
        self.waiting.add(name)

    def step(self, name: str, step: int) -> None:
        """Record a trial's step; repeated reports of earlier steps are ignored."""
        self.waiting.discard(name)
        self._began = self._began or (time.monotonic(), self.steps_done)
        self.reached[name] = max(step, self.reached.get(name, 0))

    def end(self, name: str, status: str) -> None:
        """Record the end of a trial."""
        self.waiting.discard(name)
        self._began = self._began or (time.monotonic(), self.steps_done)
        self.ended[name] = status

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end at this process's speed; None before its first step."""
        if self._began is None:
            return None
        since, first = self._began
        done = self.steps_done
        return (self.steps - done) * (time.monotonic() - since) / (done - first) if done > first else None

    def facts(self) -> dict[str, Any]:
        """Return the progress fields of status.json."""
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
            logger.warning("%s could not be written: %s", files.join(self.folder, STATUS), error)


def summarize_sweep(folder: str) -> dict[str, Any]:
    """Summarize a sweep, most important facts first; unknown ones are left out.

    Returns:
        sweep, state (starting, running, done, failed if a trial failed, interrupted, or unknown; "dead" in place of
        starting or running if its process is gone), trials, done, stopped, failed, steps_done, steps, eta_seconds,
        running (trial -> its progress), written_seconds (since the last write).
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
    """Return the values, seeds included, of the trials that Optuna has proposed so far, in order."""
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
