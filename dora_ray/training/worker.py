"""What every training worker runs: the loop over steps, in this process or as one rank of a Ray Train group."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_ray.config import Config
from dora_ray.data.plan import slots_of_rank
from dora_ray.data.stream import SlotBatch
from dora_ray.errors import CheckpointError, ConfigError, DivergenceError, DoRAError, VideoError
from dora_ray.evaluation.features import training_size
from dora_ray.evaluation.knn import evaluate_knn
from dora_ray.evaluation.options import KnnOptions
from dora_ray.training.checkpoint import checkpoint_name, load_state, take_snapshot
from dora_ray.training.journal import Journal, MetricsWindow, collapse_warnings, write_status
from dora_ray.training.optim import Rates
from dora_ray.training.step import TrainState, apply_step, initial_state, sum_slots
from dora_ray.training.worlds import Job, RayWorld, World, discard_after


def ray_worker(arguments: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: what all ranks raise alike ends the run, anything else restarts it.

    Errors of ours are decided by all ranks together, so every rank returns; Ray would repeat the run after an
    exception, which cannot help. The launcher reads the error from status.json.
    """
    job: Job = arguments["job"]
    world = RayWorld(job)
    try:
        train_loop(job, world)
    except (DivergenceError, VideoError, CheckpointError) as error:
        if world.rank == 0:
            record_failure(job.run, error)


def record_failure(run: str, error: DoRAError) -> None:
    """Say in status.json how the run ended."""
    write_status(run, state="failed", error=type(error).__name__, message=str(error))


def train_loop(job: Job, world: World) -> None:
    """Train from the newest checkpoint to the last step."""
    config = job.config
    _prepare_torch(job, world)
    state = initial_state(config, world.device)
    checkpoint = world.latest()
    if checkpoint is not None:
        load_state(checkpoint, state, config, job.plan)
    journal = None
    if world.rank == 0:
        discard_after(job.checkpoints, checkpoint)
        name = checkpoint_name(state.step) if checkpoint is not None else None
        journal = Journal(
            job.run, step=state.step, num_steps=config.optim.steps, world_size=world.size, last_checkpoint=name
        )
    slots = slots_of_rank(world.rank, world.size, config.optim.slots)
    stream = world.stream(range(state.step, config.optim.steps), slots)
    try:
        _Loop(job, world, state, journal, stream, len(slots)).run()
    finally:
        if journal is not None:
            journal.close()


def _prepare_torch(job: Job, world: World) -> None:
    torch.set_num_threads(job.config.cluster.threads_per_worker)
    if world.device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    if job.config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


@dataclass
class _Loop:
    """The steps of one attempt on one rank."""

    job: Job
    world: World
    state: TrainState
    journal: Journal | None
    stream: Iterator[SlotBatch]
    slots_a_step: int
    _saved_at: float = field(default_factory=time.monotonic)
    _window: MetricsWindow = field(default_factory=MetricsWindow)

    def run(self) -> None:
        """All steps that are left, and a last checkpoint."""
        steps, begun_at = self.job.config.optim.steps, self.state.step
        while self.state.step < steps:
            due = self._step()
            if due and self.state.step < steps:
                self._save(wait=False)
        if self.state.step > begun_at:
            self._save(wait=True)
        if self.journal is not None:
            self.journal.event("end", step=self.state.step)
            self.journal.status("done", self.state.step)

    def _step(self) -> bool:
        """One step; whether a checkpoint is due after it, which rank 0 decides and the reduction carries to all."""
        config, state = self.job.config, self.state
        started = time.monotonic()
        batches = [next(self.stream) for _ in range(self.slots_a_step)]
        waited = time.monotonic() - started
        assert all(batch.step == state.step for batch in batches), "the clip stream left the plan's order"
        result = sum_slots(state, batches, self._records(batches), config, self.world.all_reduce)
        slots, bad, due = _split_records(result.records, config)
        self._count_bad(bad)
        measures, rates = apply_step(state, result, config)
        if self.journal is not None:
            self.journal.ledger(state.step - 1, slots)
            measures["center_norm"] = float(state.center.norm())
            self._window.add(measures, waited, time.monotonic() - started)
            self._log(self.journal, rates)
        return due

    def _records(self, batches: Sequence[SlotBatch]) -> Tensor:
        """This rank's integers: its slots' hashes, its unreadable clips, and on rank 0 whether a checkpoint is due."""
        optim = self.job.config.optim
        records = np.zeros(optim.slots * (1 + optim.clips_per_slot) + 1, np.int64)
        for batch in batches:
            records[batch.slot] = batch.digest
            first = optim.slots + batch.slot * optim.clips_per_slot
            records[first : first + optim.clips_per_slot] = ~batch.valid
        elapsed = time.monotonic() - self._saved_at
        records[-1] = (
            self.world.rank == 0 and elapsed >= self.job.config.run.checkpoint_seconds and not self.world.busy()
        )
        return torch.from_numpy(records)

    def _count_bad(self, bad: list[int]) -> None:
        """Remember unreadable clips.

        Raises:
            VideoError: on all ranks alike, when they are too many.
        """
        config, state = self.job.config, self.state
        clips_a_step = config.optim.slots * config.optim.clips_per_slot
        state.bad_clips += [state.step * clips_a_step + position for position in bad]
        allowed = config.data.max_bad_fraction * max((state.step + 1) * clips_a_step, self.job.plan.clips_per_epoch)
        if len(bad) == clips_a_step or len(state.bad_clips) > allowed:
            clip = self.job.plan.clip(state.bad_clips[-1])
            video = self.job.plan.videos[clip.video]
            raise VideoError(
                f"step {state.step}: {len(state.bad_clips)} clips could not be read, more than data.max_bad_fraction="
                f"{config.data.max_bad_fraction:g} allows; the last is of {video.path} at "
                f"{video.times[clip.frames[0]]:.2f} s. Check "
                "that the frame store is complete and reachable from every node, or ingest the video again."
            )

    def _log(self, journal: Journal, rates: Rates) -> None:
        config, step = self.job.config, self.state.step
        last = step == config.optim.steps
        evaluation = config.evaluation
        evaluate = bool(evaluation.images) and (last or _divides(evaluation.every_steps, step))
        if not (last or evaluate or _divides(config.run.log_every_steps, step)):
            return
        clips = config.optim.slots * config.optim.clips_per_slot
        values = self._window.means(clips) | {
            "lr": rates.lr,
            "weight_decay": rates.weight_decay,
            "teacher_momentum": rates.teacher_momentum,
            "bad_clips": float(len(self.state.bad_clips)),
        }
        if evaluate:
            values |= self._knn(journal)
        journal.metrics(step, values)
        views = config.optim.clips_per_slot * config.clip.num_frames * config.num_globals
        if step > config.optim.warmup_steps:
            for warning in collapse_warnings(values, num_outputs=config.head.num_outputs, num_images=views):
                journal.event("warning", step=step, message=warning)

    def _knn(self, journal: Journal) -> dict[str, float]:
        """Accuracy of kNN with the teacher as it is now; the other ranks wait in their next reduction.

        Images that cannot be read must not end one rank of a training: they are told as a warning.
        """
        backbone, evaluation = self.state.teacher.backbone, self.job.config.evaluation
        assert evaluation.images is not None
        options = KnnOptions(
            image_size=training_size(backbone), max_images=evaluation.max_images, device=str(self.world.device)
        )
        try:
            result = evaluate_knn(backbone, evaluation.images, **options.model_dump(exclude={"random_init", "seed"}))
        except (ConfigError, OSError) as error:
            journal.event("warning", step=self.state.step, message=f"no kNN: {error}")
            return {}
        return {"knn": float(result["top1"])}

    def _save(self, *, wait: bool) -> None:
        snapshot = None
        if self.world.rank == 0:
            snapshot = take_snapshot(self.state, self.job.config, self.job.plan, self.world.size)
        name = checkpoint_name(self.state.step)
        self.world.save(snapshot, name, self.journal, self.state.step, wait=wait)
        self._saved_at = time.monotonic()


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _split_records(records: Tensor, config: Config) -> tuple[list[int], list[int], bool]:
    """Slot hashes, positions of unreadable clips in the batch, whether a checkpoint is due."""
    slots, bad, due = records.split([config.optim.slots, records.numel() - config.optim.slots - 1, 1])
    return slots.tolist(), bad.nonzero().flatten().tolist(), bool(due)
