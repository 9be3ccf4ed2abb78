"""One run with faults compared with an undisturbed run, and the requirements on both."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from dora_ray import files
from dora_ray.chaos.damage import cut_newest_checkpoint, damage_store, hang_decoder
from dora_ray.chaos.judge import Hit, Row, attempts, judge, weights_difference
from dora_ray.chaos.nodes import LocalNodes
from dora_ray.chaos.schedule import Strike, draw_schedule
from dora_ray.chaos.strikes import strike, walk_path
from dora_ray.chaos.training import CLIPS_PER_SLOT, SMALL, EndedError, StalledError, Training
from dora_ray.checkpoints import resolve_checkpoint
from dora_ray.config import load_config
from dora_ray.errors import DoRAError
from dora_ray.training.inputs import ingest_videos
from dora_ray.training.records.journal import CONFIG, METRICS, read_events, read_history, read_lines

# Steps are faster than nodes: those before the first fault must last until the spare processes have started, as in a
# training after its first half minute, and those after the last fault until the recovery.
FIRST_STEP, STEPS_A_FAULT, STEPS_AFTER = 240, 15, 240
# Quick runs do not wait for the spare processes.
QUICK_FIRST_STEP = 80
# If a run finishes too early, it is repeated once with this many times the steps.
MORE_STEPS = 4
CHECKPOINT_SECONDS = 4.0
# Time of writing a checkpoint and of Ray registering it; until then, a kill falls back to the one before.
COMMIT_SECONDS = 2.0
# Announced faults lose nothing, because the workers save first.
ANNOUNCED = ("drain", "join")
# Unannounced faults lose the work since the last checkpoint.
UNANNOUNCED = ("worker_kill", "node_kill", "checkpoint_kill", "stall")
PLAIN = ("cluster.fast_recovery=false",)
NODES, PATH = 2, (4, 2, 3, 4)
MOST_WORKERS = 4
END_SECONDS = 300.0
Inflict = Callable[[Training, LocalNodes], Iterable[Hit]]


@dataclass(frozen=True)
class Trial:
    """Outcome of one run.

    Attributes:
        name: the fault, or the joined names of several faults.
        rows: a row for each fault.
        max_difference: largest |difference| of any number in the last checkpoint; None if the run did not end.
        problems: a sentence for each violated requirement; empty if all held.
        notes: other observations.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    max_difference: float | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def num_steps(num_faults: int, *, first: int = FIRST_STEP) -> int:
    """Return the steps of a run with the given number of faults, none before step `first`."""
    return first + STEPS_A_FAULT * num_faults + STEPS_AFTER


class Laboratory:
    """Folder with a video, its frame store, and undisturbed runs; a context manager that ends running trainings."""

    def __init__(self, folder: Path, video: Path) -> None:
        self.folder = folder
        self._video = video
        self._references: dict[int, Training] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for training in self._references.values():
            training.kill()

    def words(self, steps: int, num_workers: str) -> tuple[str, ...]:
        """Return the arguments of `dora-ray train`."""
        return (
            "tiny",
            *SMALL,
            f"data.videos=[{self._video}]",
            f"data.store={self.folder / 'store'}",
            f"optim.steps={steps}",
            f"optim.warmup_steps={steps}",
            f"cluster.num_workers={num_workers}",
            f"run.checkpoint_seconds={CHECKPOINT_SECONDS:g}",
        )

    def begin_reference(self, steps: int) -> Training:
        """Start the undisturbed run of this length in one process, without Ray, unless already started.

        It runs beside the other run, whose nodes and workers take long to start.
        """
        if steps not in self._references:
            run = self.folder / f"undisturbed-{steps}"
            self._references[steps] = Training(run, self.words(steps, "0"), address=None)
        return self._references[steps]

    def reference(self, steps: int) -> Path:
        """Return the folder of the undisturbed run, once it has ended."""
        training = self.begin_reference(steps)
        _finish(training)
        return training.run

    def run_live(
        self, name: str, faults: Sequence[str], *, seed: int, quick: bool = False, plain: bool = False
    ) -> Trial:
        """Run with faults injected one after the other; `plain` recovers at Ray Train's own pace."""
        first = QUICK_FIRST_STEP if quick else FIRST_STEP
        steps = num_steps(len(faults), first=first)
        schedule = draw_schedule(faults, seed=seed, first=first, last=steps - STEPS_AFTER)
        inflict = partial(_strike_all, schedule)
        return self._run(name, steps, NODES, inflict, settings=PLAIN if plain else (), counted=True)

    def run_path(self, name: str) -> Trial:
        """Run with the number of workers going down and up again."""
        walk = partial(walk_path, PATH, first=QUICK_FIRST_STEP, apart=STEPS_A_FAULT)
        return self._run(name, num_steps(3 * len(PATH)), PATH[0], walk)

    def _run(
        self,
        name: str,
        steps: int,
        num_nodes: int,
        inflict: Inflict,
        *,
        settings: Sequence[str] = (),
        counted: bool = False,
    ) -> Trial:
        """Run on `num_nodes` nodes with faults and additional settings; `counted` checks the number of restarts."""
        run = self.folder / name
        hits: list[Hit] = []
        problems: list[str] = []
        try:
            try:
                self._strike(run, steps, num_nodes, inflict, settings, hits)
            except EndedError:
                steps *= MORE_STEPS
                hits.clear()
                shutil.rmtree(run)
                self._strike(run, steps, num_nodes, inflict, settings, hits)
        except StalledError as error:
            problems.append(str(error))
        try:
            if problems:
                return Trial(name, _rows(run, self.reference(steps), hits), problems=problems)
            trial = compare(name, run, self.reference(steps), hits)
        except DoRAError as error:
            return Trial(name, problems=[*problems, str(error)])
        return replace(trial, problems=[*trial.problems, *unprovoked(hits, run)]) if counted else trial

    def _strike(
        self, run: Path, steps: int, num_nodes: int, inflict: Inflict, settings: Sequence[str], hits: list[Hit]
    ) -> None:
        """Train to the end while injecting faults; hits are added one by one, so those before a stall are reported."""
        with LocalNodes(num_nodes) as nodes:
            training = Training(run, (*self.words(steps, f"[1, {MOST_WORKERS}]"), *settings), address=nodes.address)
            try:
                # By then the frame store, which both share, is filled; otherwise the reference would start its own Ray.
                training.wait("its plan", (run / CONFIG).exists, seconds=END_SECONDS)
                self.begin_reference(steps)
                hits.extend(inflict(training, nodes))
                _finish(training)
            finally:
                training.kill()

    def run_alone(self, name: str, *, seed: int) -> Trial:
        """Run a standalone fault, one of schedule.ALONE."""
        if name == "resize_path":
            return self.run_path(name)
        steps, run = num_steps(0, first=QUICK_FIRST_STEP), self.folder / name
        try:
            if name == "hung_decoder":
                with LocalNodes(NODES) as nodes:
                    words = self.words(steps, str(NODES))
                    return Trial(name, notes=[hang_decoder(run, words, address=nodes.address)])
            words = self.words(steps, "0")
            self._fill_store(words)
            if name == "corrupt_segment":
                return Trial(name, notes=[damage_store(run, words, store=self.folder / "store", seed=seed)])
            self.begin_reference(steps)
            note = cut_newest_checkpoint(run, words, seed=seed)
            return replace(compare(name, run, self.reference(steps), ()), notes=[note])
        except DoRAError as error:
            return Trial(name, problems=[str(error)])

    def _fill_store(self, words: tuple[str, ...]) -> None:
        config = load_config(*words)
        ingest_videos(config, str(config.data.store))


def _strike_all(schedule: Sequence[Strike], training: Training, nodes: LocalNodes) -> Iterator[Hit]:
    return (strike(what, training, nodes) for what in schedule)


def _finish(training: Training) -> None:
    status = training.finish(seconds=END_SECONDS)
    if status != 0:
        raise StalledError(f"the training ended with status {status}: {training.tail()}")


def _rows(run: Path, reference: Path, hits: Sequence[Hit]) -> list[Row]:
    tries = attempts(read_lines(files.join(run, METRICS)), read_events(str(run)))
    return judge(
        hits,
        tries,
        history=read_history(str(run)),
        reference=read_history(str(reference)),
        clips_per_slot=CLIPS_PER_SLOT,
    )


def compare(name: str, run: Path, reference: Path, hits: Sequence[Hit]) -> Trial:
    """Compare a finished run with the undisturbed one."""
    rows = _rows(run, reference, hits)
    difference = weights_difference(resolve_checkpoint(run), resolve_checkpoint(reference))
    problems = [problem for row in rows for problem in limits(row)]
    if read_history(str(run)) != read_history(str(reference)):
        problems.append("the committed history differs from that of the undisturbed run")
    if difference != 0.0:
        problems.append(f"weights, optimizer state or center differ from the undisturbed run's by up to {difference}")
    return Trial(name, rows, difference, problems)


def unprovoked(hits: Sequence[Hit], run: Path) -> list[str]:
    """Report restarts that no fault accounts for; a fault that takes a node away may cause two."""
    starts = [line["time"] for line in read_events(str(run)) if line["event"] == "start"]
    early = sum(time < min((hit.time for hit in hits), default=math.inf) for time in starts) - 1
    allowed = sum(2 if hit.fault in ("node_kill", "drain") else 1 for hit in hits)
    extra = len(starts) - 1 - early - allowed
    if early <= 0 and extra <= 0:
        return []
    return [f"{max(early, 0)} restarts before the first fault and {max(extra, 0)} more than the faults account for"]


def limits(row: Row) -> list[str]:
    """Return a sentence for each limit that the cost of a fault exceeds."""
    lost, problems = row.work_lost_seconds, []
    where = f"{row.fault} at step {row.step}"
    if row.recovered_seconds is None:
        problems.append(f"{where}: no step followed")
    elif row.fault == "join" and row.world_sizes[-1] <= row.world_sizes[0]:
        problems.append(f"{where}: a node joined, but the workers were {' > '.join(map(str, row.world_sizes))}")
    if row.clips_lost or row.clips_repeated:
        problems.append(f"{where}: {row.clips_lost} clips lost, {row.clips_repeated} repeated")
    if row.fault in ANNOUNCED and row.steps_lost:
        problems.append(f"{where}: {row.steps_lost} steps lost, although it was announced")
    if row.fault in UNANNOUNCED and lost > CHECKPOINT_SECONDS + COMMIT_SECONDS:
        problems.append(
            f"{where}: {lost:.1f} s of work lost, more than run.checkpoint_seconds={CHECKPOINT_SECONDS:g} and "
            f"{COMMIT_SECONDS:g} s for writing"
        )
    return problems
