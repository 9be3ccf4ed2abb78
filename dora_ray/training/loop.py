"""Training loop of one attempt on one rank: steps, requests between steps, records and checkpoints."""

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

# Warn when writing one checkpoint takes longer than this many checkpoint intervals: no other starts meanwhile.
OVERDUE_INTERVALS = 5
# Leave a preempted node this long before its deadline, plus twice the time of the last step and checkpoint.
LEAVE_MARGIN_SECONDS = 3.0
# Ray Train's controller accepts one report per worker and health check (every two seconds); report() blocks until then.
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
        """Run the remaining steps and write the final checkpoint."""
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
                # No rank may exit before rank 0 has saved: Ray ends the group at the first exit. If saving failed, a
                # resize can wait.
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
        """Run one step and return the request to act on: each rank adds its own to the reduction."""
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
        """Pack this rank's integers: slot hashes, unreadable clips, its request, and rank 0's report flag."""
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
        """Return whether to report the coming step to Ray Train; True on rank 0 only, which decides for all ranks."""
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
        """Return whether the last checkpoint is still being written; warn once in the events if that is overdue."""
        assert self._writer is not None
        assert self.journal is not None
        writing = self._writer.busy()
        if writing and overdue and not self._told_overdue:
            seconds = time.monotonic() - self._saved_at
            message = f"the checkpoint started {seconds:.0f} s ago is still being written; no other starts until it is"
            self.journal.event("warning", step=self.state.step, message=f"{self.job.checkpoints}: {message}")
        self._told_overdue = writing and overdue
        return writing

    def _count_bad(self, bad: list[int]) -> None:
        """Record unreadable clips.

        Raises:
            VideoError: there are too many; raised on all ranks alike.
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
                f"{config.data.max_bad_fraction:g} allows; the last one is from {video.path} at "
                f"{video.times[clip.frames[0]]:.2f} s. Check "
                "that the frame store is complete and reachable from every node, or ingest the video again."
            )

    def _is_logged(self, step: int) -> bool:
        """Return whether to log metrics after this step; the same on all ranks."""
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
        """Measure the teacher; the other ranks wait in `report`."""
        values, problems = measure_teacher(self.state.teacher.backbone, self.job.config, device=str(self.world.device))
        for problem in problems:
            journal.event("warning", step=self.state.step, message=problem)
        return values

    def _draw(self, journal: Journal, batches: Sequence[SlotBatch]) -> None:
        """Draw the teacher's objects; the other ranks wait in the next all-reduce. A failure must not end the run."""
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
        """Start writing a checkpoint; only rank 0 writes."""
        self._saved_at, self._saved_step = time.monotonic(), self.state.step
        if self._writer is not None:
            snapshot = take_snapshot(self.state, self.job.config, self.job.plan, self.world.size)
            self._writer.start(snapshot, reason=reason, copy_seconds=time.monotonic() - self._saved_at)

    def _save_for_the_lost(self) -> None:
        """Save the steps since the last checkpoint, which all ranks completed, so that they need not be repeated.

        Rank 0 saves. If rank 0 itself is lost, or hangs in the all-reduce (as with NCCL), the steps are repeated.
        """
        here.noticed()
        if self._writer is not None and self.state.step > self._saved_step:
            self._save("lost worker")
            self._writer.failed()  # waits for the write


def _divides(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _split_records(records: Tensor, config: Config) -> tuple[list[int], list[int], Request, bool, Tensor]:
    """Return slot hashes, positions of unreadable clips, the largest request, the report flag and the ranks' waits."""
    sizes = [config.optim.slots, config.optim.slots * config.optim.clips_per_slot, len(Request), 1]
    hashes, bad, asked, report, waits = records.split([*sizes, records.numel() - sum(sizes)])
    request = Request(int(asked.nonzero().max()))
    return hashes.tolist(), bad.nonzero().flatten().tolist(), request, bool(report.item()), waits
