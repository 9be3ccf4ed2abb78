"""What every training worker runs: the loop over steps, in this process or as one rank of a Ray Train group."""

from __future__ import annotations

import faulthandler
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_ray import errors, files
from dora_ray.config import Config
from dora_ray.data.plan import slots_of_rank
from dora_ray.data.stream import SlotBatch
from dora_ray.errors import CheckpointError, ClusterError, ConfigError, DoRAError, VideoError
from dora_ray.evaluation.features import training_size
from dora_ray.evaluation.knn import evaluate_knn
from dora_ray.evaluation.options import KnnOptions
from dora_ray.training.checkpoint import (
    CheckpointWriter,
    checkpoint_name,
    load_newest,
    load_state,
    set_newest,
    take_snapshot,
)
from dora_ray.training.journal import (
    CONFIG,
    STATUS,
    Journal,
    MetricsWindow,
    collapse_warnings,
    read_status,
    write_status,
)
from dora_ray.training.numerics import NOT_DETERMINISTIC, prepare_torch
from dora_ray.training.optim import Rates
from dora_ray.training.requests import Request, here
from dora_ray.training.step import TrainState, apply_step, initial_state, sum_slots
from dora_ray.training.worlds import Job, LostPeerError, RayWorld, World

logger = logging.getLogger(__name__)

# What torch and CUDA say of memory that there is not, in errors of no class of their own.
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory")
# Writing one checkpoint may take so many times the time between two before it is said that none follows.
OVERDUE_INTERVALS = 5
# A preempted node is left so long before its deadline, and twice the time of the last step and checkpoint.
LEAVE_MARGIN_SECONDS = 3.0


def ray_worker(arguments: dict[str, Any]) -> DoRAError | None:
    """Entry point of a Ray Train worker: what all ranks raise alike ends the run, anything else restarts it.

    Errors of ours are decided by all ranks together, so every rank returns the error, which is how the launcher gets
    it; Ray would repeat the run after an exception, which cannot help. One rank alone can run out of its device's
    memory: it says so in status.json, and the ranks that Ray starts after its exception find it there and return.
    """
    job: Job = arguments["job"]
    if (failed := recorded_failure(job.run)) is not None:
        return failed
    # From here on, each step begins it anew: what loads a checkpoint may hang, too.
    watch_for_stalls(job.config)
    world = RayWorld(job)
    try:
        train_loop(job, world)
    except OneRankError as error:
        record_failure(job.run, ClusterError(str(error)))
        raise
    except DoRAError as error:
        if world.rank == 0:
            record_failure(job.run, error)
        return error
    finally:
        here.ended()
        faulthandler.cancel_dump_traceback_later()
    return None


class OneRankError(ClusterError):
    """What one rank has met and the others do not know of."""


def watch_for_stalls(config: Config) -> None:
    """End this process, with all its stacks on stderr, unless it is told in time that it goes on.

    The watching thread is not Python's: it works when a library holds the interpreter's lock for ever.
    """
    faulthandler.dump_traceback_later(config.cluster.stall_seconds, exit=True)


def record_failure(run: str, error: DoRAError) -> None:
    """Say in status.json how the run ended; a disk that takes no more must not hide it."""
    try:
        write_status(run, state="failed", error=type(error).__name__, message=str(error))
    except (OSError, DoRAError) as problem:
        logger.warning("%s cannot be written: %s", files.join(run, STATUS), problem)


def recorded_failure(run: str) -> DoRAError | None:
    """The error that ended the run, as status.json has it; None where it has not failed."""
    status = read_status(run)
    return getattr(errors, status["error"])(status["message"]) if status.get("state") == "failed" else None


def train_loop(job: Job, world: World) -> None:
    """Train from the newest checkpoint to the last step."""
    entered = time.time()
    config = job.config
    torch.set_num_threads(config.cluster.threads_per_worker)
    prepare_torch(world.device, deterministic=config.run.deterministic)
    world.share(_unshared(job.run))
    state = initial_state(config, world.device)
    refused = _restore(job, world, state)
    journal = None
    if world.rank == 0:
        journal = Journal(
            job.run,
            step=state.step,
            num_steps=config.optim.steps,
            world_size=world.size,
            entered=entered,
            last_checkpoint=checkpoint_name(state.step) if state.step else None,
        )
        for problem in refused:
            journal.event("warning", step=state.step, message=f"{problem} Training goes on from step {state.step}.")
    slots = slots_of_rank(world.rank, world.size, config.optim.slots)
    stream = world.stream(range(state.step, config.optim.steps), slots)
    try:
        with _named_limits(config):
            _Loop(job, world, state, journal, stream, len(slots)).run()
    finally:
        if journal is not None:
            journal.close()


def _unshared(run: str) -> ClusterError | None:
    """The error where this machine does not see what the launcher wrote."""
    if files.exists(files.join(run, CONFIG)):
        return None
    return ClusterError(
        f"{socket.gethostname()} does not see {run}: --out must be a folder that all nodes share, or a URI such as "
        "s3://bucket/runs/walk"
    )


def _restore(job: Job, world: World, state: TrainState) -> list[str]:
    """Put the newest good checkpoint into the state, on all ranks the one that rank 0 finds good.

    Returns:
        A sentence for each newer checkpoint that was refused; on rank 0.

    Raises:
        CheckpointError: rank 0's, on all ranks alike.
        ClusterError: a rank does not see what rank 0 sees, on all ranks alike.
    """
    folder, refused = None, list[str]()
    problem: DoRAError | None = None
    if world.rank == 0:
        try:
            folder, refused = load_newest(job.checkpoints, state, job.config, job.plan)
            set_newest(job.checkpoints, folder)
        except CheckpointError as error:
            problem = error
    world.share(problem)
    folder = world.agree(folder)
    if world.rank > 0 and folder is not None:
        try:
            load_state(folder, state, job.config, job.plan)
        except CheckpointError as error:
            problem = ClusterError(
                f"{socket.gethostname()} cannot read {folder}, which another node wrote ({error}): --out must be a "
                "folder that all nodes share, or a URI such as s3://bucket/runs/walk"
            )
    world.share(problem)
    return refused


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
    _step_seconds: float = 0.0
    _window: MetricsWindow = field(default_factory=MetricsWindow)
    _writer: CheckpointWriter | None = None
    _warned: set[str] = field(default_factory=set)
    _told_overdue: bool = False
    _saved_step: int = field(init=False)

    def __post_init__(self) -> None:
        self._saved_step = self.state.step
        if self.journal is not None:
            self._writer = CheckpointWriter(
                self.job.checkpoints, keep=self.job.config.run.keep_checkpoints, journal=self.journal
            )

    def run(self) -> None:
        """All steps that are left, and a last checkpoint."""
        steps, begun_at = self.job.config.optim.steps, self.state.step
        while self.state.step < steps:
            if isinstance(self.world, RayWorld):
                watch_for_stalls(self.job.config)
            try:
                request = self._step()
            except LostPeerError:
                self._save_for_the_lost()
                raise
            if request is Request.NONE or self.state.step == steps:
                continue
            reason = here.take(request)
            self._save(reason)
            if request is Request.LEAVE:
                # No rank ends before rank 0 has saved: the first end has Ray end the others. A resize can wait.
                lost = self._writer is not None and self._writer.failed()
                if self.world.agree("stay" if lost and reason == "resize" else None) is not None:
                    continue
                if self.journal is not None:
                    ends = here.signal is not None or reason == "abort"
                    self.journal.status("stopped" if ends else "waiting", self.state.step)
                self.world.leave()
        if self.state.step > begun_at:
            self._save("end")
        if self._writer is not None and self.journal is not None:
            self._writer.finish()
            self.journal.event("end", step=self.state.step)
            self.journal.status("done", self.state.step)
        here.left()

    def _step(self) -> Request:
        """One step; what is requested after it: each rank adds its own requests to the reduction."""
        config, state = self.job.config, self.state
        started = time.monotonic()
        batches = [next(self.stream) for _ in range(self.slots_a_step)]
        waited = time.monotonic() - started
        assert all(batch.step == state.step for batch in batches), "the clip stream left the plan's order"
        result = sum_slots(state, batches, self._records(batches), config, self.world.all_reduce)
        slots, bad, request = _split_records(result.records, config)
        self._count_bad(bad)
        measures, rates = apply_step(state, result, config)
        if self.journal is not None:
            self.journal.ledger(state.step - 1, slots)
            self.journal.stepped(state.step, waited)
            measures["center_norm"] = float(state.center.norm())
            self._window.add(measures, waited, time.monotonic() - started)
            self._log(self.journal, rates)
        self._step_seconds = time.monotonic() - started
        return request

    def _records(self, batches: Sequence[SlotBatch]) -> Tensor:
        """This rank's integers: its slots' hashes, its unreadable clips, and its requests."""
        optim = self.job.config.optim
        records = np.zeros(optim.slots * (1 + optim.clips_per_slot) + len(Request), np.int64)
        for batch in batches:
            records[batch.slot] = batch.digest
            first = optim.slots + batch.slot * optim.clips_per_slot
            records[first : first + optim.clips_per_slot] = ~batch.valid
        records[-len(Request) + self._request()] = 1
        return torch.from_numpy(records)

    def _request(self) -> Request:
        """What this rank asks for: what it was asked itself, and on rank 0 what the clock says."""
        request = here.pending()
        if self._writer is None:
            return request
        if here.deadline is not None:
            margin = LEAVE_MARGIN_SECONDS + 2 * (self._step_seconds + self._writer.seconds)
            if time.time() > here.deadline - margin:
                here.make(Request.LEAVE, "deadline")
                return Request.LEAVE
        since, interval = time.monotonic() - self._saved_at, self.job.config.run.checkpoint_seconds
        if since < interval or self._is_writing(overdue=since > OVERDUE_INTERVALS * interval):
            return request
        return max(request, Request.INTERVAL)

    def _is_writing(self, *, overdue: bool) -> bool:
        """Whether the last checkpoint is still being written; said once, in the events, when that is overdue."""
        assert self._writer is not None
        assert self.journal is not None
        writing = self._writer.busy()
        if writing and overdue and not self._told_overdue:
            seconds = time.monotonic() - self._saved_at
            message = f"the checkpoint begun {seconds:.0f} s ago is still being written: no other is made until then"
            self.journal.event("warning", step=self.state.step, message=f"{self.job.checkpoints}: {message}")
        self._told_overdue = writing and overdue
        return writing

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
            warnings = collapse_warnings(values, num_outputs=config.head.num_outputs, num_images=views)
            for warning in set(warnings) - self._warned:  # each once, until it no longer holds
                journal.event("warning", step=step, message=warning)
            self._warned = set(warnings)

    def _knn(self, journal: Journal) -> dict[str, float]:
        """Accuracy of kNN with the teacher as it is now; the other ranks wait in their next reduction.

        Images that cannot be read, or are too many for the memory, must not end one rank of a training: they are told
        as a warning.
        """
        backbone, evaluation = self.state.teacher.backbone, self.job.config.evaluation
        assert evaluation.images is not None
        options = KnnOptions(
            image_size=training_size(backbone), max_images=evaluation.max_images, device=str(self.world.device)
        )
        try:
            result = evaluate_knn(backbone, evaluation.images, **options.model_dump(exclude={"random_init", "seed"}))
        except (ConfigError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            message = str(error).partition("\n")[0] or "out of memory"
            journal.event("warning", step=self.state.step, message=f"no kNN: {message}")
            return {}
        return {"knn": float(result["top1"])}

    def _save(self, reason: str) -> None:
        """Begin to write a checkpoint; rank 0 alone has anything to do."""
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        if self._writer is not None:
            snapshot = take_snapshot(self.state, self.job.config, self.job.plan, self.world.size)
            self._writer.start(snapshot, reason=reason, copy_seconds=time.monotonic() - self._saved_at)

    def _save_for_the_lost(self) -> None:
        """Save the steps since the last checkpoint, which every rank had done: nobody has to do them again.

        Rank 0 does it. Where it is the one that is gone, or waits in vain (NCCL does), they are done again.
        """
        here.noticed()
        if self._writer is not None and self.state.step > self._saved_step:
            self._save("lost worker")
            self._writer.failed()  # which waits for it


@contextmanager
def _named_limits(config: Config) -> Iterator[None]:
    """Name the setting to change where this process runs out of memory, or torch has no deterministic kernel.

    Raises:
        OneRankError: in place of such an error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if NOT_DETERMINISTIC in str(error):
            raise OneRankError(f"{error}: set run.deterministic=false, at the price of equal runs") from error
        if not _is_out_of_memory(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise OneRankError(
            f"a worker ran out of memory ({said}): lower optim.clips_per_slot="
            f"{config.optim.clips_per_slot}, the clips of one forward. Fewer clips a slot and more slots "
            "(optim.slots) are the same batch. Or lower clip.num_frames, crops.num_locals or head.num_outputs."
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in words for text in OUT_OF_MEMORY)


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _split_records(records: Tensor, config: Config) -> tuple[list[int], list[int], Request]:
    """Slot hashes, positions of unreadable clips in the batch, the largest request of all ranks."""
    slots, requests = config.optim.slots, len(Request)
    hashes, bad, asked = records.split([slots, records.numel() - slots - requests, requests])
    return hashes.tolist(), bad.nonzero().flatten().tolist(), Request(int(asked.nonzero().max()))
