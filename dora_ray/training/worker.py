"""Program of a training worker, in this process or as one rank of a Ray Train group: set up, train, report errors."""

from __future__ import annotations

import faulthandler
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dora_ray import errors, files
from dora_ray.checkpoints import checkpoint_name, newest_meta, set_newest
from dora_ray.config import Config
from dora_ray.errors import CheckpointError, ClusterError, ConfigError, DoRAError
from dora_ray.training.beginning import begin_with_given
from dora_ray.training.elastic.requests import here
from dora_ray.training.loop import Loop
from dora_ray.training.numerics import NOT_DETERMINISTIC, prepare_torch, require_fp8
from dora_ray.training.records.checkpoint import load_newest, load_state
from dora_ray.training.records.journal import (
    CONFIG,
    STATUS,
    Journal,
    read_status,
    write_status,
)
from dora_ray.training.step import TrainState, initial_state
from dora_ray.training.worlds import Job, OneRankError, RayWorld, World, watch_for_stalls

logger = logging.getLogger(__name__)

# Part of CUDA's messages for what a graph cannot record: "when stream is capturing", "error during capture".
WHILE_RECORDED = "captur"
# Parts of torch's and CUDA's messages for out-of-memory errors without a class of their own.
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory")


def ray_worker(arguments: dict[str, Any]) -> DoRAError | None:
    """Run one rank of a Ray Train group. An error that all ranks share ends the run; any other restarts the group.

    All ranks agree on a DoRAError, so each returns it instead of raising: Ray would restart the run after an exception,
    which cannot help. An error on one rank alone, such as out of memory, is recorded in status.json and raised; the
    restarted ranks find it there and return it.
    """
    job: Job = arguments["job"]
    if (failed := recorded_failure(job.run)) is not None:
        return failed
    # Loading a checkpoint may hang, too. Later each step restarts this timer.
    watch_for_stalls(job.config)
    world = RayWorld(job, arguments["contents"])
    try:
        train_loop(job, world)
    except OneRankError as error:
        record_failure(job.run, error.told)
        raise
    except DoRAError as error:
        if world.rank == 0:
            record_failure(job.run, error)
        return error
    finally:
        here.ended()
        faulthandler.cancel_dump_traceback_later()
    return None


def record_failure(run: str, error: DoRAError) -> None:
    """Record in status.json how the run ended. A full disk must not hide the error itself."""
    try:
        write_status(run, state="failed", error=type(error).__name__, message=str(error))
    except (OSError, DoRAError) as problem:
        logger.warning("%s cannot be written: %s", files.join(run, STATUS), problem)


def recorded_failure(run: str) -> DoRAError | None:
    """Return the error that ended the run, from status.json; None if it has not failed."""
    status = read_status(run)
    return getattr(errors, status["error"])(status["message"]) if status.get("state") == "failed" else None


def train_loop(job: Job, world: World) -> None:
    """Train from the newest checkpoint to the last step."""
    entered = time.time()
    config = job.config
    torch.set_num_threads(config.cluster.threads_per_worker)
    prepare_torch(world.device, config.optim, deterministic=config.run.deterministic)
    world.share(_problem_here(job, world.device))
    newest = newest_meta(job.checkpoints) if world.rank == 0 else None
    # Prefetch while the networks are built and loaded.
    world.start_stream(newest[1].step if newest is not None else 0)
    state = initial_state(config, world.device)
    refused = _restore(job, world, state)
    given = _begin(world, state, config) if not state.step else None
    journal = None
    if world.rank == 0:
        journal = Journal(
            job.run,
            step=state.step,
            num_steps=config.optim.steps,
            world_size=world.size,
            entered=entered,
            last_checkpoint=checkpoint_name(state.step) if state.step else None,
            loggers=config.run.loggers,
        )
        if given is not None:
            journal.event("init", step=0, message=given)
        for problem in refused:
            journal.event("warning", step=state.step, message=f"{problem} Training continues from step {state.step}.")
    try:
        with _named_limits(config):
            Loop(job, world, state, journal, world.stream(state.step)).run()
    finally:
        if journal is not None:
            journal.close()


def _problem_here(job: Job, device: torch.device) -> ClusterError | None:
    """Return an error if this machine cannot run a worker, though others may; None if it can."""
    if not files.exists(files.join(job.run, CONFIG)):
        return ClusterError(
            f"{socket.gethostname()} cannot access {job.run}: --out must be a folder that all nodes share, or a URI "
            "such as s3://bucket/runs/walk"
        )
    if job.config.optim.teacher_precision == "fp8":
        try:
            require_fp8(device)
        except ClusterError as error:
            return error
    return None


def _begin(world: World, state: TrainState, config: Config) -> str | None:
    """Load the weights of `model.init` on every rank; return a sentence about them, None if `model.init` is unset.

    Raises:
        ClusterError: a rank cannot read them; raised on all ranks alike.
    """
    given, problem = None, None
    try:
        given = begin_with_given(state, config)
    except (CheckpointError, ConfigError) as error:
        problem = ClusterError(
            f"{socket.gethostname()} cannot load model.init ({error}): give a path that all nodes share, or a URI"
        )
    world.share(problem)
    return given


def _restore(job: Job, world: World, state: TrainState) -> list[str]:
    """Load the newest good checkpoint, as found by rank 0, into the state on all ranks.

    Returns:
        A sentence for each newer checkpoint that was refused; empty except on rank 0.

    Raises:
        CheckpointError: rank 0 cannot load one; raised on all ranks alike.
        ClusterError: a rank cannot read the checkpoint that rank 0 chose; raised on all ranks alike.
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


@contextmanager
def _named_limits(config: Config) -> Iterator[None]:
    """Name the setting to change for lack of memory, of a deterministic kernel, or of one that a CUDA graph can record.

    Raises:
        OneRankError: replaces such an error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if NOT_DETERMINISTIC in str(error):
            told = ClusterError(f"{error}: set run.deterministic=false; two runs may then differ")
            raise OneRankError(told) from error
        recording = WHILE_RECORDED in str(error)
        # What ended the recording; the error that follows says only that it ended.
        first = error.__context__ if recording and isinstance(error.__context__, Exception) else error
        said = next(iter(str(first).splitlines()), type(first).__name__)
        if not _is_out_of_memory(first):
            if not recording:
                raise
            told = ClusterError(f"this step cannot be a CUDA graph ({said}): set optim.cuda_graph=false")
            raise OneRankError(told) from error
        on_gpu = isinstance(first, torch.OutOfMemoryError) and config.optim.cuda_graph
        told = ClusterError(
            f"a worker ran out of memory ({said}): lower optim.clips_per_slot="
            f"{config.optim.clips_per_slot}, the clips of one forward. Fewer clips per slot and more slots "
            "(optim.slots) keep the batch size. Or lower clip.num_frames, crops.num_locals or head.num_outputs."
            + (" If the GPU is full only while it evaluates, optim.cuda_graph=false." if on_gpu else "")
        )
        raise OneRankError(told) from error


def _is_out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in words for text in OUT_OF_MEMORY)
