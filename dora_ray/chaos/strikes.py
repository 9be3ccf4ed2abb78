"""Live faults, injected while a run trains."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from dora_ray.chaos.judge import Hit
from dora_ray.chaos.nodes import LocalNodes
from dora_ray.chaos.schedule import Strike
from dora_ray.chaos.training import StalledError, Training
from dora_ray.checkpoints import CHECKPOINTS, META

STEP_SECONDS = 180.0
DRAIN_SECONDS = 5.0
WRITE_POLL_SECONDS = 0.0005
# Checkpoints to try: the writer is stopped with SIGSTOP, which may come after the write.
WRITES_TRIED = 20


def strike(what: Strike, training: Training, nodes: LocalNodes) -> Hit:
    """Wait for the step, inject the fault, and wait for a step of a new attempt.

    Raises:
        StalledError: no new attempt made a step.
    """
    training.wait(f"step {what.step}", lambda: training.done() >= what.step, seconds=STEP_SECONDS)
    attempt = training.attempt()
    hit = Hit(what.fault, training.done(), time.time())
    if what.fault == "worker_kill":
        nodes.signal_worker(what.draw, signal.SIGKILL)
    elif what.fault == "stall":
        nodes.signal_worker(what.draw, signal.SIGSTOP)
    elif what.fault == "checkpoint_kill":
        kill_writer(training)
        hit = Hit(what.fault, training.done(), time.time())
    elif what.fault == "join":
        nodes.join()
    else:
        _take_a_node(what, training, nodes)
    training.wait(
        f"a step after {what.fault} at step {hit.step}", lambda: training.attempt() > attempt, seconds=STEP_SECONDS
    )
    return hit


def _take_a_node(what: Strike, training: Training, nodes: LocalNodes) -> None:
    """Kill a node at once, or drain it and kill it at the deadline; if it is the only one, add another first."""
    if len(nodes) == 1:
        nodes.join()
    node = nodes.pick(what.draw)
    if what.fault == "drain":
        deadline = nodes.drain(node, DRAIN_SECONDS)
        time.sleep(max(0.0, deadline - time.time()))
    nodes.kill_node(node)


def kill_writer(training: Training) -> None:
    """Send SIGKILL to the rank that writes a checkpoint while its folder exists, but its last file does not.

    Raises:
        StalledError: no write was caught midway.
    """
    checkpoints = training.run / CHECKPOINTS
    for _ in range(WRITES_TRIED):
        training.wait("a checkpoint", lambda: _half_written(checkpoints), seconds=STEP_SECONDS, poll=WRITE_POLL_SECONDS)
        pid = training.events("start")[-1]["pid"]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            if _half_written(checkpoints):
                os.kill(pid, signal.SIGKILL)
                return
            os.kill(pid, signal.SIGCONT)
    raise StalledError(f"{WRITES_TRIED} checkpoints were complete before their writer could be stopped")


def _half_written(checkpoints: Path) -> bool:
    """Return whether the newest folder lacks its last file; older ones may already be partly deleted."""
    newest = max(checkpoints.glob("step-*"), default=None)
    return newest is not None and not (newest / META).exists()


def walk_path(path: Sequence[int], training: Training, nodes: LocalNodes, *, first: int, apart: int) -> Iterator[Hit]:
    """Kill and add nodes so that the run has each number of workers in turn, for some steps each.

    Raises:
        StalledError: the run did not reach a size.
    """

    def arrive(size: int, step: int) -> None:
        training.wait(
            f"step {step} with {size} workers",
            lambda: training.done() >= step and training.world_size() == size,
            seconds=STEP_SECONDS,
        )

    arrive(path[0], first)
    for before, after in pairwise(path):
        hit = Hit("join" if after > before else "node_kill", training.done(), time.time())
        for _ in range(after - before):
            nodes.join()
        for _ in range(before - after):
            nodes.kill_node(nodes.pick(0.0))
        arrive(after, hit.step)
        arrive(after, training.done() + apart // 2)
        yield hit
