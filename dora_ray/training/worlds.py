"""A run's job, and the ranks that compute it: this process alone, or a Ray Train worker group."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS
from dora_ray.clips.plan import Plan
from dora_ray.clips.stream import SlotBatch, local_slots, ray_slots
from dora_ray.config import Config
from dora_ray.errors import DoRAError
from dora_ray.training.elastic.requests import LEAVE_SECONDS, here
from dora_ray.training.reduction import AllReduce


@dataclass(frozen=True)
class Job:
    """What a run is, as it is sent to every worker.

    Attributes:
        config: the configuration.
        plan: the plan.
        run: the run's folder.
    """

    config: Config
    plan: Plan
    run: str

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return files.join(self.run, CHECKPOINTS)


class LostPeerError(RuntimeError):
    """Another rank is gone, so this step's sum will not come; the training state is that after the step before."""


class World(Protocol):
    """The ranks of one attempt, as one of them sees it."""

    rank: int
    size: int
    device: torch.device
    all_reduce: AllReduce | None

    def agree(self, choice: str | None) -> str | None:
        """Rank 0's choice, on every rank."""

    def share(self, problem: DoRAError | None) -> None:
        """Raise the first problem that any rank has, on every rank: none waits for one that gave up."""

    def stream(self, steps: range, slots: Sequence[int]) -> Iterator[SlotBatch]:
        """This rank's slots, in order."""

    def leave(self) -> None:
        """Everything is saved: end, or wait for the end. Returns when it does not come."""


class LocalWorld:
    """One worker, in this very process."""

    rank, size = 0, 1
    all_reduce: AllReduce | None = None

    def __init__(self, job: Job) -> None:
        self.device = torch.device("cuda" if job.config.cluster.use_gpu else "cpu")
        self._job = job

    def agree(self, choice: str | None) -> str | None:
        """Rank 0's choice, on every rank."""
        return choice

    def share(self, problem: DoRAError | None) -> None:
        """Raise the problem."""
        if problem is not None:
            raise problem

    def stream(self, steps: range, slots: Sequence[int]) -> Iterator[SlotBatch]:
        """This rank's slots, in order."""
        keys = ((step, slot) for step in steps for slot in slots)
        return local_slots(
            self._job.plan,
            keys,
            prefetch=self._job.config.data.prefetch_slots,
            num_threads=self._job.config.cluster.threads_per_worker,
            decode_seconds=self._job.config.data.decode_seconds,
        )

    def leave(self) -> None:
        """End as the signal that was caught would have ended the process."""
        if here.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if here.signal is not None:
            raise SystemExit(128 + here.signal)


class RayWorld:
    """One rank of a Ray Train worker group."""

    def __init__(self, job: Job) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        device = get_device()
        assert isinstance(device, torch.device)
        self.device = device
        self.all_reduce: AllReduce | None = _all_reduce if self.size > 1 else None
        self._job = job

    def agree(self, choice: str | None) -> str | None:
        """Rank 0's choice, on every rank."""
        if self.size == 1:
            return choice
        choices = [choice]
        torch.distributed.broadcast_object_list(choices, src=0)
        return choices[0]

    def share(self, problem: DoRAError | None) -> None:
        """Raise the first problem that any rank has, on every rank."""
        problems: list[DoRAError | None] = [problem] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(problems, problem)
        for found in problems:
            if found is not None:
                raise found

    def stream(self, steps: range, slots: Sequence[int]) -> Iterator[SlotBatch]:
        """This rank's slots, in order."""
        data, cluster = self._job.config.data, self._job.config.cluster
        return ray_slots(
            self._job.plan,
            steps,
            slots,
            prefetch=data.prefetch_slots,
            slots_per_task=data.slots_per_task,
            cpus_per_task=cluster.decode_cpus,
            num_streams=self.size,
            node_label=cluster.decode_label,
            decode_seconds=data.decode_seconds,
        )

    def leave(self) -> None:
        """Wait to be ended by Ray Train; a process that was told to end does so."""
        here.left()
        if here.signal is not None:
            os._exit(128 + here.signal)
        faulthandler.cancel_dump_traceback_later()  # it was to end a step that hangs
        # Ray Train ends the workers of a preempted node at its deadline, not before.
        time.sleep(LEAVE_SECONDS + max(0.0, (here.deadline or 0.0) - time.time()))
        here.deadline = None
        here.stay()


def _all_reduce(tensor: torch.Tensor) -> None:
    try:
        torch.distributed.all_reduce(tensor)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo has no class of its own for a closed connection
        raise LostPeerError(str(error)) from error
