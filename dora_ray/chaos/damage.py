"""Faults in files: a checkpoint cut short between two launches, damage to a frame store, a decode that hangs.

What cannot be made up for must be refused by name, and leave what is still good where it is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from dora_ray import files
from dora_ray.chaos.training import StalledError, Training
from dora_ray.errors import CheckpointError, VideoError
from dora_ray.training.checkpoint import META, MODEL, STATE
from dora_ray.training.journal import CONFIG, METRICS, read_lines
from dora_ray.training.worlds import CHECKPOINTS

CHECKPOINT_SECONDS, NUM_CHECKPOINTS = 0.5, 2
# A clip that hangs takes three attempts, each in a new process; the second such clip ends the run.
DECODE_SECONDS, BAD_FRACTION = 2.0, 0.005
LAUNCH_SECONDS, END_SECONDS = 120.0, 300.0


def cut_newest_checkpoint(run: Path, words: tuple[str, ...], *, seed: int) -> str:
    """Kill a run, cut the newest checkpoint's files to half, and resume until the run has ended.

    Returns:
        what became of the resume.

    Raises:
        StalledError: it neither used the last good checkpoint nor named it, or lost it.
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
    if status == 0:
        return f"{newest.name} was cut: the run went on from the one before"
    if status != CheckpointError.exit_status or str(good) not in said or not (good / META).exists():
        raise StalledError(f"the resume ended with status {status}, and did not name {good} or lost it: {said}")
    shutil.rmtree(newest)
    status, said = launch(run, (), resume=True)
    if status != 0:
        raise StalledError(f"the resume from {good} ended with status {status}: {said}")
    return f"{newest.name} was cut: it was refused, naming {good.name}, and the run went on from there"


def damage_store(run: Path, words: tuple[str, ...], *, store: Path, seed: int) -> str:
    """Train on a copy of the store with noise in the middle of a data file.

    Returns:
        how the run ended.

    Raises:
        StalledError: neither with an error that names the store, nor with unreadable clips that are counted.
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


def hang_decoder(run: Path, words: tuple[str, ...], *, address: str, store: Path) -> str:
    """Train on a copy of the store where reading one data file never ends: it becomes a pipe that nobody writes to.

    Returns:
        how the run ended.

    Raises:
        StalledError: not with an error that names the video.
    """
    copy = run.with_name(f"{run.name}-store")
    shutil.copytree(store, copy)
    limits = (
        f"data.decode_seconds={DECODE_SECONDS:g}",
        f"data.max_bad_fraction={BAD_FRACTION:g}",
        "data.slots_per_task=1",
        f"cluster.stall_seconds={END_SECONDS:g}",
    )
    training = Training(run, (*words, f"data.store={copy}", *limits), address=address)
    try:
        # The launching process has read the store's times by then, and no worker has read a picture.
        training.wait("the plan", (run / CONFIG).exists, seconds=LAUNCH_SECONDS)
        segment = largest_segment(copy)
        segment.unlink()
        os.mkfifo(segment)
        status = training.finish(seconds=END_SECONDS)
    finally:
        training.kill()
    if status != VideoError.exit_status or "video.mp4" not in training.tail():
        raise StalledError(f"the run with a hung decoder ended with status {status}: {training.tail()}")
    return f"stopped: {training.tail().strip().splitlines()[-1]}"


def largest_segment(store: Path) -> Path:
    """The largest data file of the first dataset of a store."""
    return max(store.glob("*/*.lance/data/*.lance"), key=lambda path: path.stat().st_size)


def launch(run: Path, words: tuple[str, ...], *, resume: bool = False) -> tuple[int, str]:
    """Train in one process, without Ray: its exit status, and the end of what it said."""
    training = Training(run, words, address=None, resume=resume)
    try:
        status = training.finish(seconds=END_SECONDS)
    finally:
        training.kill()
    return status, training.tail()
