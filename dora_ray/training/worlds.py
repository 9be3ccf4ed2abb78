"""A run's job, and the ranks that compute it: this process alone, or a Ray Train worker group."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from dora_ray import files, weights
from dora_ray.config import Config
from dora_ray.data.plan import Plan
from dora_ray.data.stream import SlotBatch, local_slots, ray_slots
from dora_ray.training.checkpoint import LATEST, Snapshot, write_snapshot
from dora_ray.training.journal import Journal
from dora_ray.training.reduction import AllReduce

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Job:
    """What a run is, as it is sent to every worker.

    Attributes:
        config: the configuration.
        plan: the plan.
        run: the run's folder.
        resume_from: checkpoint that the run continues, found when it was launched.
    """

    config: Config
    plan: Plan
    run: str
    resume_from: str | None

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return files.join(self.run, CHECKPOINTS)


class World(Protocol):
    """The ranks of one attempt, as one of them sees it."""

    rank: int
    size: int
    device: torch.device
    all_reduce: AllReduce | None

    def latest(self) -> str | None:
        """The newest complete checkpoint."""

    def stream(self, steps: range, slots: Sequence[int]) -> Iterator[SlotBatch]:
        """This rank's slots, in order."""

    def save(self, snapshot: Snapshot | None, name: str, journal: Journal | None, step: int, *, wait: bool) -> None:
        """Store a checkpoint; called by all ranks, with the snapshot on rank 0 alone."""

    def busy(self) -> bool:
        """Whether the last checkpoint is still being written."""


class _Writer:
    """Writes one snapshot at a time, in the order of the steps, and knows whether one is under way."""

    def __init__(self, checkpoints: str) -> None:
        self._checkpoints = checkpoints
        self._idle = threading.Event()
        self._idle.set()

    def begin(self) -> None:
        """Wait for the snapshot before this one, so that `latest` never goes back."""
        self._idle.wait()
        self._idle.clear()

    def write(self, snapshot: Snapshot, journal: Journal, step: int) -> str:
        """Write what was begun; the lines of the journal that the weights have seen come first."""
        started = time.monotonic()
        try:
            journal.flush()
            folder = write_snapshot(snapshot, self._checkpoints)
            journal.checkpoint(snapshot.name, step, time.monotonic() - started)
        finally:
            self._idle.set()
        return folder

    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return not self._idle.is_set()


class LocalWorld:
    """One worker, in this very process."""

    rank, size = 0, 1
    all_reduce: AllReduce | None = None

    def __init__(self, job: Job) -> None:
        self.device = torch.device("cuda" if job.config.cluster.use_gpu else "cpu")
        self._job = job
        self._writer = _Writer(job.checkpoints)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def latest(self) -> str | None:
        """The newest complete checkpoint."""
        return self._job.resume_from

    def stream(self, steps: range, slots: Sequence[int]) -> Iterator[SlotBatch]:
        """This rank's slots, in order."""
        keys = ((step, slot) for step in steps for slot in slots)
        return local_slots(
            self._job.plan,
            keys,
            prefetch=self._job.config.data.prefetch_slots,
            num_threads=self._job.config.cluster.threads_per_worker,
        )

    def save(self, snapshot: Snapshot | None, name: str, journal: Journal | None, step: int, *, wait: bool) -> None:
        """Store a checkpoint; called by all ranks, with the snapshot on rank 0 alone."""
        assert snapshot is not None
        assert journal is not None
        self._finish()
        self._writer.begin()
        self._pending = self._pool.submit(self._write, snapshot, journal, step)
        if wait:
            self._finish()

    def _write(self, snapshot: Snapshot, journal: Journal, step: int) -> None:
        self._writer.write(snapshot, journal, step)
        for old in step_names(self._job.checkpoints)[: -self._job.config.run.keep_checkpoints]:
            files.remove(files.join(self._job.checkpoints, old))

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def busy(self) -> bool:
        """Whether the last checkpoint is still being written."""
        return self._writer.busy()


class RayWorld:
    """One rank of a Ray Train worker group; Ray's checkpoint manager owns the checkpoints."""

    def __init__(self, job: Job) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        device = get_device()
        assert isinstance(device, torch.device)
        self.device = device
        self.all_reduce: AllReduce | None = torch.distributed.all_reduce if self.size > 1 else None
        self._job = job
        self._writer = _Writer(job.checkpoints)

    def latest(self) -> str | None:
        """The newest complete checkpoint."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        names = [self._job.resume_from.rstrip("/").rsplit("/", 1)[-1]] if self._job.resume_from else []
        names += [checkpoint.path.rstrip("/").rsplit("/", 1)[-1]] if checkpoint is not None else []
        return files.join(self._job.checkpoints, max(names)) if names else None

    def stream(self, steps: range, slots: Sequence[int]) -> Iterator[SlotBatch]:
        """This rank's slots, in order."""
        data, cluster = self._job.config.data, self._job.config.cluster
        return ray_slots(
            self._job.plan,
            steps,
            slots,
            window_steps=data.window_steps,
            prefetch=data.prefetch_slots,
            slots_per_task=data.slots_per_task,
            cpus_per_task=cluster.decode_cpus,
            num_streams=self.size,
            node_label=cluster.decode_label,
        )

    def save(self, snapshot: Snapshot | None, name: str, journal: Journal | None, step: int, *, wait: bool) -> None:
        """Store a checkpoint; called by all ranks, with the snapshot on rank 0 alone."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        def upload(_: Checkpoint, __: str) -> Checkpoint:
            assert snapshot is not None
            assert journal is not None
            self._writer.write(snapshot, journal, step)
            return target

        target = Checkpoint(files.join(self._job.checkpoints, name))
        if snapshot is not None:
            self._writer.begin()
        ray.train.report(
            {"step": step},
            checkpoint=target if snapshot is not None else None,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=upload if snapshot is not None else None,
        )

    def busy(self) -> bool:
        """Whether the last checkpoint is still being written."""
        return self._writer.busy()


def step_names(checkpoints: str) -> list[str]:
    """Names of all checkpoints, complete or not, oldest first."""
    return [name for name in files.list_names(checkpoints) if name.startswith("step-")]


def discard_after(checkpoints: str, kept: str | None) -> None:
    """Remove the checkpoints that are newer than the one an attempt begins from (None: all), and point `latest` at it.

    A killed group may leave a folder half written, or a whole one that Ray had not registered yet; nobody else removes
    them.
    """
    name = kept.rstrip("/").rsplit("/", 1)[-1] if kept is not None else ""
    newer = [other for other in step_names(checkpoints) if other > name]
    if newer and name:
        files.write_text(files.join(checkpoints, LATEST), name + "\n")
    elif newer:
        files.remove(files.join(checkpoints, LATEST))
    for other in newer:
        files.remove(files.join(checkpoints, other))


def latest_checkpoint(run: str) -> str | None:
    """The run's newest complete checkpoint; None when it has none yet."""
    checkpoints = files.join(run, CHECKPOINTS)
    if not files.exists(files.join(checkpoints, LATEST)):
        return None
    return weights.resolve_checkpoint(run)
