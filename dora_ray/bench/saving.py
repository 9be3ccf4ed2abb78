"""Cost of a checkpoint: the snapshot within a step, and the slowdown of steps during the write."""

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
    """Measurement of one checkpoint.

    Attributes:
        held: seconds that the snapshot blocked training.
        steps: seconds of each step during the write.
        seconds: duration of the write.
    """

    held: float
    steps: list[float]
    seconds: float


class Saving:
    """Steps with a checkpoint, written as rank 0 does in training.

    An unmeasured checkpoint is written first, because a process's first write goes to fresh memory.

    Args:
        step: runs a step and returns its seconds.
        state: state that the step changes.
        config: configuration of the run.
        folder: folder of the run's files; its speed counts.

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
        """Return the seconds of a snapshot and of all steps, at least one, until it is written.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        held = self._begin()
        steps = [self._step()]
        while self._writer.busy():
            steps.append(self._step())
        self._writer.finish()
        self.written.append(Written(held, steps, self._writer.seconds))
        return held + sum(steps)

    def _begin(self) -> float:
        """Take a snapshot and start writing it; return the seconds of the snapshot."""
        device = self._state.center.device
        synchronize(device)
        started = time.perf_counter()
        snapshot = take_snapshot(self._state, self._config, self._plan, 1)
        synchronize(device)
        held = time.perf_counter() - started
        self._writer.start(snapshot, reason="bench", copy_seconds=held)
        return held


def cost(written: Sequence[Written], alone: Sequence[float]) -> dict[str, float]:
    """Return the cost of a checkpoint to training, as medians.

    Args:
        written: the checkpoints.
        alone: seconds of a step without a checkpoint, in the round of each checkpoint.

    Returns:
        checkpoint_write_seconds: duration of the background write; checkpoint_held_seconds: duration of the snapshot;
        checkpoint_slowdown_seconds: total extra time of the steps during the write; checkpoint_share: the last two as
        a share of the 30 seconds between checkpoints.
    """
    slower = [sum(one.steps) - len(one.steps) * step for one, step in zip(written, alone, strict=True)]
    lost = [one.held + more for one, more in zip(written, slower, strict=True)]
    return {
        "checkpoint_write_seconds": statistics.median(one.seconds for one in written),
        "checkpoint_held_seconds": statistics.median(one.held for one in written),
        "checkpoint_slowdown_seconds": statistics.median(slower),
        "checkpoint_share": statistics.median(lost) / INTERVAL_SECONDS,
    }
