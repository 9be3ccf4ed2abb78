"""A run's job, and the ranks that train it: this process alone, or a Ray Train worker group."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS
from dora_ray.clips.contents import Contents, slot_keys
from dora_ray.clips.loader import local_slots
from dora_ray.clips.plan import Plan
from dora_ray.clips.slot import SlotBatch
from dora_ray.config import Config
from dora_ray.errors import DoRAError
from dora_ray.training.elastic.requests import LEAVE_SECONDS, here
from dora_ray.training.reduction import AllReduce

if TYPE_CHECKING:
    from ray.data import DataIterator

    from dora_ray.clips.dataset import StreamSettings


@dataclass(frozen=True)
class Job:
    """A run, as it is sent to every worker.

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
    """Another rank was lost during the all-reduce. The training state is still that of the previous step."""


class OneRankError(DoRAError):
    """An error on one rank that the other ranks do not share.

    Attributes:
        told: the error to end the run with.
    """

    def __init__(self, told: DoRAError) -> None:
        super().__init__(str(told))
        self.told = told


def watch_for_stalls(config: Config) -> None:
    """Exit this process, with all stacks on stderr, unless called again within cluster.stall_seconds.

    The watchdog is a C thread, so it works even if a library never releases the GIL.
    """
    faulthandler.dump_traceback_later(config.cluster.stall_seconds, exit=True)


def stream_settings(job: Job) -> StreamSettings:
    """Return the settings of a run's clip stream."""
    from dora_ray.clips.dataset import StreamSettings

    data, cluster = job.config.data, job.config.cluster
    return StreamSettings(
        run=job.run,
        num_steps=job.config.optim.steps,
        slots_per_task=data.slots_per_task,
        prefetch=max(1, data.prefetch_slots // data.slots_per_task),
        decode_cpus=cluster.decode_cpus,
        decode_label=cluster.decode_label,
        decode_seconds=data.decode_seconds,
    )


class World(Protocol):
    """The ranks of one attempt, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    all_reduce: AllReduce | None

    def agree(self, choice: str | None) -> str | None:
        """Return rank 0's choice on every rank."""

    def share(self, problem: DoRAError | None) -> None:
        """Raise the first problem of any rank on every rank, so that none waits for a rank that has stopped."""

    def start_stream(self, step: int) -> None:
        """Start prefetching clips from `step`, where rank 0 expects to continue."""

    def stream(self, step: int) -> Iterator[list[SlotBatch]]:
        """Yield this rank's slots of each step, from `step` on."""

    def blocked(self) -> dict[str, float]:
        """Return the seconds so far that this rank waited for Ray Data, by stage; empty without Ray."""

    def report(self, metrics: dict[str, float]) -> None:
        """Report a line of metrics to Ray Train; called on all ranks after the same step, rank 0's line counts."""

    def leave(self) -> None:
        """Exit, or wait to be stopped, once everything is saved. Return if nobody stops this process."""


class LocalWorld:
    """A single worker in this process."""

    rank, size = 0, 1
    all_reduce: AllReduce | None = None

    def __init__(self, job: Job, contents: Contents, has_ended: Callable[[], bool]) -> None:
        """Store the inputs of the clip stream.

        Args:
            job: the run.
            contents: contents of its plan.
            has_ended: returns whether the ingest has ended; raises its error.
        """
        self.device = torch.device("cuda" if job.config.cluster.use_gpu else "cpu")
        self._job, self._contents, self._has_ended = job, contents, has_ended

    def agree(self, choice: str | None) -> str | None:
        """Return rank 0's choice on every rank."""
        return choice

    def share(self, problem: DoRAError | None) -> None:
        """Raise the problem."""
        if problem is not None:
            raise problem

    def start_stream(self, step: int) -> None:
        """Do nothing: reader threads start immediately."""

    def stream(self, step: int) -> Iterator[list[SlotBatch]]:
        """Yield this rank's slots of each step, from `step` on."""
        config, slots = self._job.config, self._job.plan.slots
        wanted = ((step, slot) for step in range(step, config.optim.steps) for slot in range(slots))
        batches = local_slots(
            self._contents,
            slot_keys(self._contents, wanted, self._has_ended),
            prefetch=config.data.prefetch_slots,
            num_threads=config.cluster.threads_per_worker,
            decode_seconds=config.data.decode_seconds,
        )
        try:
            while found := list(islice(batches, slots)):
                yield found
        finally:
            batches.close()

    def blocked(self) -> dict[str, float]:
        """Return nothing: the local reader has no stages."""
        return {}

    def report(self, metrics: dict[str, float]) -> None:
        """Do nothing: there is no Ray Train to report to."""

    def leave(self) -> None:
        """Exit as the caught signal would have ended the process."""
        if here.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if here.signal is not None:
            raise SystemExit(128 + here.signal)


class RayWorld:
    """One rank of a Ray Train worker group."""

    def __init__(self, job: Job, contents: Any) -> None:
        """Set up the rank from Ray Train's context.

        Args:
            job: the run.
            contents: reference to the contents of its plan, see `dataset.make_clips`.
        """
        import ray.train
        from ray.train.torch import get_device

        from dora_ray.clips.dataset import NAME
        from dora_ray.clips.rank_stream import RankStream

        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        device = get_device()
        assert isinstance(device, torch.device)
        self.device = device
        self.all_reduce: AllReduce | None = _all_reduce if self.size > 1 else None
        self._job, self._contents = job, contents
        self._stream = RankStream(
            ray.train.get_dataset_shard(NAME),
            job.plan,
            stream_settings(job),
            rank=self.rank,
            size=self.size,
            is_alive=lambda: watch_for_stalls(job.config),
            new_shard=self._new_shard,
        )

    def agree(self, choice: str | None) -> str | None:
        """Return rank 0's choice on every rank."""
        if self.size == 1:
            return choice
        choices = [choice]
        torch.distributed.broadcast_object_list(choices, src=0)
        return choices[0]

    def share(self, problem: DoRAError | None) -> None:
        """Raise the first problem of any rank on every rank."""
        problems: list[DoRAError | None] = [problem] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(problems, problem)
        for found in problems:
            if found is not None:
                raise found

    def _new_shard(self) -> DataIterator:
        """Return this rank's shard of a new dataset; rank 0 makes it as Ray Train's controller made the first."""
        import ray

        from dora_ray.clips.dataset import deal, make_clips

        shards = [b""]
        if self.rank == 0:
            dataset = make_clips(self._contents, stream_settings(self._job))
            shards[0] = ray.cloudpickle.dumps(deal(dataset, self.size))
        if self.size > 1:
            torch.distributed.broadcast_object_list(shards, src=0)
        mine: DataIterator = ray.cloudpickle.loads(shards[0])[self.rank]
        return mine

    def start_stream(self, step: int) -> None:
        """Start prefetching clips from `step`, where rank 0 expects to continue."""
        self._stream.start(step)

    def stream(self, step: int) -> Iterator[list[SlotBatch]]:
        """Yield this rank's slots of each step, from `step` on.

        Raises:
            OneRankError: the stream failed; the other ranks may see the error at another step.
        """
        try:
            yield from self._stream.steps(step)
        except DoRAError as error:
            raise OneRankError(error) from error

    def blocked(self) -> dict[str, float]:
        """Return the seconds so far that this rank waited for Ray Data, by stage."""
        return self._stream.blocked()

    def report(self, metrics: dict[str, float]) -> None:
        """Report metrics to Ray Train, its dashboard and Ray Tune.

        Checkpoints are not reported. Ray's manager refuses to start if one that it knows was pruned or set aside, and
        it cannot commit one while its controller is busy with the resize that the checkpoint is for.
        """
        import ray.train

        ray.train.report(metrics)

    def leave(self) -> None:
        """Wait to be stopped by Ray Train; exit at once after a signal."""
        here.left()
        if here.signal is not None:
            os._exit(128 + here.signal)
        faulthandler.cancel_dump_traceback_later()  # only meant for a step that hangs
        # Ray Train stops the workers of a preempted node at its deadline, not before.
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
