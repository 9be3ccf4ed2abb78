"""The program of a training worker, in this process or as one rank of a Ray Train group: its beginning and end."""

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

# What torch and CUDA say of memory that there is not, in errors of no class of their own.
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory")


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
    prepare_torch(world.device, config.optim, deterministic=config.run.deterministic)
    world.share(_problem_here(job, world.device))
    newest = newest_meta(job.checkpoints) if world.rank == 0 else None
    # Read ahead while the networks are made and loaded.
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
            journal.event("warning", step=state.step, message=f"{problem} Training goes on from step {state.step}.")
    try:
        with _named_limits(config):
            Loop(job, world, state, journal, world.stream(state.step)).run()
    finally:
        if journal is not None:
            journal.close()


def _problem_here(job: Job, device: torch.device) -> ClusterError | None:
    """Return what keeps a worker from beginning on this machine, and need not on others; None where nothing does."""
    if not files.exists(files.join(job.run, CONFIG)):
        return ClusterError(
            f"{socket.gethostname()} does not see {job.run}: --out must be a folder that all nodes share, or a URI "
            "such as s3://bucket/runs/walk"
        )
    if job.config.optim.teacher_precision == "fp8":
        try:
            require_fp8(device)
        except ClusterError as error:
            return error
    return None


def _begin(world: World, state: TrainState, config: Config) -> str | None:
    """Put the weights of `model.init` into the state, on every rank; say what was taken, None where none are given.

    Raises:
        ClusterError: a rank cannot read them, on all ranks alike.
    """
    given, problem = None, None
    try:
        given = begin_with_given(state, config)
    except (CheckpointError, ConfigError) as error:
        problem = ClusterError(
            f"{socket.gethostname()} cannot begin with model.init ({error}): all nodes must see it, or it must be a URI"
        )
    world.share(problem)
    return given


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
            told = ClusterError(f"{error}: set run.deterministic=false, at the price of equal runs")
            raise OneRankError(told) from error
        if not _is_out_of_memory(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        told = ClusterError(
            f"a worker ran out of memory ({said}): lower optim.clips_per_slot="
            f"{config.optim.clips_per_slot}, the clips of one forward. Fewer clips a slot and more slots "
            "(optim.slots) are the same batch. Or lower clip.num_frames, crops.num_locals or head.num_outputs."
        )
        raise OneRankError(told) from error


def _is_out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in words for text in OUT_OF_MEMORY)
