"""The steps of one attempt on one rank: what is asked for between them, what is noted, and when it is saved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dora_ray.clips.slot import SlotBatch
from dora_ray.config import Config
from dora_ray.errors import VideoError
from dora_ray.training.drawing import ObjectPictures
from dora_ray.training.elastic.requests import Request, here
from dora_ray.training.measuring import is_due, measure_teacher
from dora_ray.training.optim import Rates
from dora_ray.training.records.checkpoint import CheckpointWriter, take_snapshot
from dora_ray.training.records.collapse import CollapseWatch
from dora_ray.training.records.journal import Journal, MetricsWindow
from dora_ray.training.records.waits import Waits
from dora_ray.training.step import TrainState, apply_step, sum_slots
from dora_ray.training.worlds import Job, LostPeerError, RayWorld, World, watch_for_stalls

# Writing one checkpoint may take so many times the time between two before it is said that none follows.
OVERDUE_INTERVALS = 5
# A preempted node is left so long before its deadline, and twice the time of the last step and checkpoint.
LEAVE_MARGIN_SECONDS = 3.0
# Ray Train's controller takes one report from a worker at each of its health checks, every two seconds, and has it wait
# until then.
REPORT_SECONDS = 5.0


@dataclass
class Loop:
    """The steps of one attempt on one rank."""

    job: Job
    world: World
    state: TrainState
    journal: Journal | None
    stream: Iterator[list[SlotBatch]]
    _saved_at: float = field(default_factory=time.monotonic)
    _reported_at: float = -math.inf
    _step_seconds: float = 0.0
    _window: MetricsWindow = field(default_factory=MetricsWindow)
    _waits: Waits = field(init=False)
    _writer: CheckpointWriter | None = None
    _collapse: CollapseWatch = field(init=False)
    _told_overdue: bool = False
    _saved_step: int = field(init=False)
    _pictures: ObjectPictures = field(init=False)

    def __post_init__(self) -> None:
        self._saved_step = self.state.step
        self._waits = Waits(self.world.rank, self.world.size, self.world.blocked)
        config = self.job.config
        self._pictures = ObjectPictures(config)
        self._collapse = CollapseWatch(
            num_outputs=config.head.num_outputs,
            num_images=config.optim.clips_per_slot * config.clip.num_frames * config.num_globals,
            num_objects=config.tracking.num_objects,
            num_steps=config.optim.steps,
            warmup_steps=config.optim.num_warmup_steps,
            teacher_temperature=config.loss.teacher_temperature,
            lr=config.optim.lr,
        )
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
        batches = next(self.stream)
        waited = time.monotonic() - started
        assert all(batch.step == state.step for batch in batches), "the clip stream left the plan's order"
        self._waits.add(waited)
        logged = self._is_logged(state.step + 1)
        records = self._records(batches)
        if logged:
            records = torch.cat([records, torch.from_numpy(self._waits.take())])
        result = sum_slots(state, batches, records, config, self.world.all_reduce)
        slots, bad, request, reported, waits = _split_records(result.records, config)
        self._count_bad(bad)
        measures, rates = apply_step(state, result, config)
        if self.journal is not None:
            self.journal.ledger(state.step - 1, slots)
            self.journal.stepped(state.step, waited)
            measures["center_norm"] = state.center.norm()
            self._window.add(measures, time.monotonic() - started)
        if logged:
            values = self._waits.values(waits.numpy())
            metrics = {"step": float(state.step)} if self.journal is None else self._log(self.journal, rates, values)
            if reported or is_due(config, state.step) or state.step == config.optim.steps:
                self._reported_at = time.monotonic()
                self.world.report(metrics)
        if self.journal is not None and self._pictures.is_due(state.step):
            self._draw(self.journal, batches)
        self._step_seconds = time.monotonic() - started
        return request

    def _records(self, batches: Sequence[SlotBatch]) -> Tensor:
        """This rank's integers: its slots' hashes, its unreadable clips, its requests, and rank 0's for a report."""
        optim = self.job.config.optim
        first_request = optim.slots * (1 + optim.clips_per_slot)
        records = np.zeros(first_request + len(Request) + 1, np.int64)
        for batch in batches:
            records[batch.slot] = batch.digest
            first = optim.slots + batch.slot * optim.clips_per_slot
            records[first : first + optim.clips_per_slot] = ~batch.valid
        records[first_request + self._request()] = 1
        records[-1] = self._is_report_due()
        return torch.from_numpy(records)

    def _is_report_due(self) -> bool:
        """Return whether this is rank 0, whose clock decides for all, and Ray Train is to hear of the coming step."""
        waited = time.monotonic() - self._reported_at
        return self.journal is not None and waited >= REPORT_SECONDS and self._is_logged(self.state.step + 1)

    def _request(self) -> Request:
        """Return this rank's pending request; rank 0 adds one when a checkpoint is due."""
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
        """Return whether the last checkpoint is still being written; say once, in the events, when that is overdue."""
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

    def _is_logged(self, step: int) -> bool:
        """Return whether metrics are due when so many steps are done: the same on all ranks."""
        config = self.job.config
        return step == config.optim.steps or is_due(config, step) or _divides(config.run.log_every_steps, step)

    def _log(self, journal: Journal, rates: Rates, waits: dict[str, float]) -> dict[str, float]:
        config, step = self.job.config, self.state.step
        clips = config.optim.slots * config.optim.clips_per_slot
        values = (
            self._window.means(clips)
            | waits
            | {
                "lr": rates.lr,
                "weight_decay": rates.weight_decay,
                "teacher_momentum": rates.teacher_momentum,
                "bad_clips": float(len(self.state.bad_clips)),
            }
        )
        if is_due(config, step):
            values |= self._measure(journal)
        journal.metrics(step, values)
        if (warning := self._collapse.look(step, values)) is not None:
            journal.event("warning", step=step, message=warning)
        return {"step": step, **values}

    def _measure(self, journal: Journal) -> dict[str, float]:
        """Measure the teacher; the other ranks wait in their report."""
        values, problems = measure_teacher(self.state.teacher.backbone, self.job.config, device=str(self.world.device))
        for problem in problems:
            journal.event("warning", step=self.state.step, message=problem)
        return values

    def _draw(self, journal: Journal, batches: Sequence[SlotBatch]) -> None:
        """Draw the teacher's objects; the other ranks wait in their next sum. A picture must not end a training."""
        state = self.state
        journal.histogram(state.step, "center", state.center.cpu().numpy())
        try:
            picture = self._pictures.draw(state.teacher.backbone, batches, state.step)
        except (MemoryError, torch.OutOfMemoryError) as error:
            message = f"no picture of objects: {str(error).partition(chr(10))[0] or 'out of memory'}"
            journal.event("warning", step=state.step, message=message)
            return
        if picture is not None:
            journal.picture(state.step, "objects", picture)

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


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _split_records(records: Tensor, config: Config) -> tuple[list[int], list[int], Request, bool, Tensor]:
    """Slot hashes, places of unreadable clips, the ranks' largest request, rank 0's for a report, the ranks' waits."""
    sizes = [config.optim.slots, config.optim.slots * config.optim.clips_per_slot, len(Request), 1]
    hashes, bad, asked, report, waits = records.split([*sizes, records.numel() - sum(sizes)])
    request = Request(int(asked.nonzero().max()))
    return hashes.tolist(), bad.nonzero().flatten().tolist(), request, bool(report.item()), waits
