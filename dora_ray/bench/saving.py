"""The cost of a checkpoint: the snapshot in the step, and the steps beside which it is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dora_ray import files
from dora_ray.bench.products import synchronize
from dora_ray.checkpoints import CHECKPOINTS
from dora_ray.clips.plan import Plan
from dora_ray.config import Config
from dora_ray.training.records.checkpoint import CheckpointWriter, take_snapshot
from dora_ray.training.records.journal import Journal
from dora_ray.training.step import TrainState

INTERVAL_SECONDS = 30.0


@dataclass(frozen=True)
class Written:
    """One checkpoint.

    Attributes:
        held: seconds that the snapshot kept the training waiting.
        steps: seconds of each step from then on until it was written.
        seconds: what writing took beside them.
    """

    held: float
    steps: list[float]
    seconds: float


class Saving:
    """Steps with a checkpoint, as a training's rank 0 makes it.

    One that is not measured is written at once: a process writes its first into memory that it never had.

    Args:
        step: does a step and gives its seconds.
        state: what the step changes.
        config: of the run.
        folder: where the run's files go; how fast it is counts.

    Attributes:
        written: a checkpoint for each call of `seconds`.
    """

    def __init__(self, step: Callable[[], float], state: TrainState, config: Config, folder: str) -> None:
        self._step, self._state, self._config = step, state, config
        self._plan = Plan(
            videos=(),
            num_frames=config.clip.num_frames,
            stride_seconds=config.clip.stride_seconds,
            avoid_cuts=config.clip.avoid_cuts,
            seed=config.run.seed,
            slots=config.optim.slots,
            clips_per_slot=config.optim.clips_per_slot,
            clip_size=config.crops.clip_size,
            clip_scale=config.crops.clip_scale,
            aspect_ratio=config.crops.aspect_ratio,
        )
        journal = Journal(folder, step=0, num_steps=1, world_size=1, entered=time.time())
        self._writer = CheckpointWriter(files.join(folder, CHECKPOINTS), keep=1, journal=journal)
        self._begin()
        self._writer.finish()
        self.written: list[Written] = []

    def seconds(self) -> float:
        """Seconds of a snapshot and of all steps until it is written, one at least.

        Raises:
            CheckpointError: it could not be written.
        """
        held = self._begin()
        steps = [self._step()]
        while self._writer.busy():
            steps.append(self._step())
        self._writer.finish()
        self.written.append(Written(held, steps, self._writer.seconds))
        return held + sum(steps)

    def _begin(self) -> float:
        """Take a snapshot and start writing it; return the seconds that the snapshot took."""
        device = self._state.center.device
        synchronize(device)
        started = time.perf_counter()
        snapshot = take_snapshot(self._state, self._config, self._plan, 1)
        synchronize(device)
        held = time.perf_counter() - started
        self._writer.start(snapshot, reason="bench", copy_seconds=held)
        return held


def cost(written: Sequence[Written], alone: Sequence[float]) -> dict[str, float]:
    """Return what a checkpoint takes out of the training; medians.

    Args:
        written: the checkpoints.
        alone: seconds of a step without one, in each one's round.

    Returns:
        checkpoint_write_seconds, in the background; checkpoint_held_seconds, of the snapshot;
        checkpoint_slowdown_seconds, by which the steps during the writing were longer, all together; and
        checkpoint_share: the last two, of the 30 seconds from one checkpoint to the next.
    """
    slower = [sum(one.steps) - len(one.steps) * step for one, step in zip(written, alone, strict=True)]
    lost = [one.held + more for one, more in zip(written, slower, strict=True)]
    return {
        "checkpoint_write_seconds": statistics.median(one.seconds for one in written),
        "checkpoint_held_seconds": statistics.median(one.held for one in written),
        "checkpoint_slowdown_seconds": statistics.median(slower),
        "checkpoint_share": statistics.median(lost) / INTERVAL_SECONDS,
    }
