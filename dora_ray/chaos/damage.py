"""Faults in files: a truncated checkpoint, a damaged frame store, a hanging decode.

What cannot be compensated must be refused with the file's name, and must leave intact data in place.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np

from dora_ray import files
from dora_ray.chaos.training import StalledError, Training
from dora_ray.checkpoints import CHECKPOINTS, META, MODEL, STATE
from dora_ray.config import Config
from dora_ray.errors import VideoError
from dora_ray.store.frames import StoredVideo
from dora_ray.training.inputs import ingest_videos, make_plan
from dora_ray.training.launch import saved_config
from dora_ray.training.records.journal import CONFIG, METRICS, read_events, read_lines

CHECKPOINT_SECONDS, NUM_CHECKPOINTS = 0.5, 2
# One data file per second of film. Two hanging clips are tolerated in an epoch; the third ends the run, steps later.
SEGMENT_SECONDS, DECODE_SECONDS, BAD_FRACTION = 1.0, 2.0, 0.011
STEPS_BETWEEN = 4
LAUNCH_SECONDS, END_SECONDS = 120.0, 300.0


def cut_newest_checkpoint(run: Path, words: tuple[str, ...], *, seed: int) -> str:
    """Kill a run, truncate files of the newest checkpoint to half, and resume until the run has ended.

    Returns:
        Description of the resume.

    Raises:
        StalledError: the run did not resume from the previous checkpoint.
    """
    training = Training(run, (*words, f"run.checkpoint_seconds={CHECKPOINT_SECONDS:g}"), address=None)
    try:
        training.wait(
            "two checkpoints", lambda: len(training.events("checkpoint")) >= NUM_CHECKPOINTS, seconds=LAUNCH_SECONDS
        )
    finally:
        training.kill()
    whole = sorted(folder for folder in (run / CHECKPOINTS).glob("step-*") if (folder / META).exists())
    newest, good = whole[-1], whole[-2]
    for name in np.random.default_rng(np.random.SeedSequence(seed)).permutation([MODEL, STATE, META])[:2]:
        os.truncate(newest / name, (newest / name).stat().st_size // 2)
    status, said = launch(run, (), resume=True)
    begins = [line["step"] for line in read_events(str(run)) if line["event"] == "start"]
    if status != 0 or begins[-1] != int(good.name.removeprefix("step-")):
        raise StalledError(
            f"{newest.name} was truncated: the resume ended with status {status} and did not "
            f"start at {good.name}, but the starts were at the steps {begins}: {said}"
        )
    return f"{newest.name} was truncated: the run resumed from {good.name}"


def damage_store(run: Path, words: tuple[str, ...], *, store: Path, seed: int) -> str:
    """Train on a copy of the store with noise in the middle of a data file.

    Returns:
        Description of the run's end.

    Raises:
        StalledError: the run neither failed naming the store, nor counted unreadable clips.
    """
    copy = run.with_name(f"{run.name}-store")
    shutil.copytree(store, copy)
    generator = np.random.default_rng(np.random.SeedSequence(seed))
    segment = largest_segment(copy)
    size = segment.stat().st_size
    with segment.open("r+b") as file:
        file.seek(int(size * generator.uniform(0.2, 0.6)))
        file.write(generator.bytes(size // 5))
    status, said = launch(run, (*words, f"data.store={copy}"))
    if status == VideoError.exit_status and (str(copy) in said or "video.mp4" in said):
        return f"refused: {said.strip().splitlines()[-1]}"
    counted = max((int(line.get("bad_clips", 0)) for line in read_lines(files.join(run, METRICS))), default=0)
    if status == 0 and counted:
        return f"the run ended, with {counted} unreadable clips counted"
    raise StalledError(f"the run on a damaged store ended with status {status}: {said}")


def hang_decoder(run: Path, words: tuple[str, ...], *, address: str) -> str:
    """Train on a store in which reading one second of film never ends, because its file is a pipe without a writer.

    Returns:
        Description of the run's end.

    Raises:
        StalledError: the hanging clips were not counted first, or the run's error did not name film and time.
    """
    limits = (
        f"data.store={run.with_name(f'{run.name}-store')}",
        f"data.segment_seconds={SEGMENT_SECONDS:g}",
        f"data.decode_seconds={DECODE_SECONDS:g}",
        f"data.max_bad_fraction={BAD_FRACTION:g}",
        "data.slots_per_task=1",
        f"cluster.stall_seconds={END_SECONDS:g}",
    )
    training = Training(run, (*words, *limits), address=address)
    try:
        # The launcher has read the store's times by then, and no worker has read a picture.
        training.wait("the plan", (run / CONFIG).exists, seconds=LAUNCH_SECONDS)
        hang = choose_hang(saved_config(str(run)), str(run.with_name(f"{run.name}-store")))
        hang.file.unlink()
        os.mkfifo(hang.file)
        status = training.finish(seconds=END_SECONDS)
    finally:
        training.kill()
    counted = [int(line["bad_clips"]) for line in training.steps()]
    said = " ".join(training.tail().split())
    if status != VideoError.exit_status or not any(place in said for place in hang.places):
        raise StalledError(f"the run with a hung decoder ended with status {status}: {training.tail()}")
    if max(counted, default=0) != hang.counted:
        raise StalledError(
            f"{hang.counted} hanging clips should be counted before the last one, but the counts were {counted}"
        )
    return f"{hang.counted} clips were counted while training went on, then: {training.tail().strip().splitlines()[-1]}"


@dataclass(frozen=True)
class Hang:
    """Data file that hangs, and the point where the run then ends.

    Attributes:
        file: the data file.
        stop: step at which data.max_bad_fraction is exceeded, in the first epoch.
        counted: hanging clips in the steps before.
        places: names of the hanging clips in error messages.
    """

    file: Path
    stop: int
    counted: int
    places: frozenset[str]


def choose_hang(config: Config, store: str) -> Hang:
    """Return the data file whose hang ends the run soonest, but several steps after the first counted clip."""
    (video,) = ingest_videos(config, store)
    plan = make_plan(config, [video])
    allowed = config.data.max_bad_fraction * plan.clips_per_epoch
    clips_a_step = config.optim.slots * config.optim.clips_per_slot
    clips = [plan.clip(number) for number in range(plan.clips_per_epoch // clips_a_step * clips_a_step)]
    found = []
    for file, frames in _files(video):
        hanging = [clip for clip in clips if not frames.isdisjoint(clip.frames)]
        steps = [clip.number // clips_a_step for clip in hanging]
        stop = next((step for number, step in enumerate(steps, 1) if number > allowed), 0)
        if steps and stop - steps[0] >= STEPS_BETWEEN:
            counted = sum(step < stop for step in steps)
            places = frozenset(f"{video.path} at {video.times[clip.frames[0]]:.2f} s" for clip in hanging)
            found.append(Hang(file, stop, counted, places))
    return min(found, key=lambda hang: hang.stop)


def _files(video: StoredVideo) -> list[tuple[Path, set[int]]]:
    """Return the data files of a video's dataset, each with its frames."""
    fragments = lance.dataset(video.uri, version=video.version).get_fragments()
    ends = np.cumsum([fragment.count_rows() for fragment in fragments])
    places = np.searchsorted(ends, video.rows, side="right")
    return [
        (Path(video.uri, "data", fragment.data_files()[0].path), set(np.flatnonzero(places == number).tolist()))
        for number, fragment in enumerate(fragments)
    ]


def largest_segment(store: Path) -> Path:
    """Return the largest data file in a store."""
    return max(store.glob("*/*.lance/data/*.lance"), key=lambda path: path.stat().st_size)


def launch(run: Path, words: tuple[str, ...], *, resume: bool = False) -> tuple[int, str]:
    """Train in one process without Ray; return the exit status and the end of the output."""
    training = Training(run, words, address=None, resume=resume)
    try:
        status = training.finish(seconds=END_SECONDS)
    finally:
        training.kill()
    return status, training.tail()
