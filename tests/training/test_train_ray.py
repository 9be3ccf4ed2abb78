"""Trainings on a real Ray cluster whose workers are killed, told to end, or diverge."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import dora_ray
from dora_ray.errors import ClusterError, DivergenceError
from dora_ray.training.records.journal import read_history, read_lines
from tests.training.test_train_local import same, weights_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
LONG = "optim.steps=60"  # room for three faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path, ray_cluster) -> Path:
    """The same run without Ray, in this process."""
    from tests.conftest import BIKES, SMALL

    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    config = dora_ray.load_config("tiny", *SMALL, f"data.videos=[{BIKES}]", f"data.store={store}", LONG)
    dora_ray.train(config, out=run)
    return run


def train_workers() -> set[int]:
    """The processes of Ray Train's workers that this process's cluster runs."""
    import psutil  # Ray brings it along

    return {child.pid for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in child.name()}


@contextmanager
def faults(run: Path, *planned: tuple[signal.Signals, int, int]) -> Iterator[list[int]]:
    """Signals to workers of a run while the block trains, one after another; yields the processes that got one.

    Each fault is a signal, the rank that gets it (of two), and the number of steps that must have been done.
    """
    struck: list[int] = []

    def strike() -> None:
        for number, rank, steps in planned:
            while len(read_lines(str(run / "metrics.jsonl"))) <= steps:
                if stop.wait(0.05):
                    return
            starts = [event for event in read_lines(str(run / "events.jsonl")) if event["event"] == "start"]
            first = starts[-1]["pid"]
            struck.append(first if rank == 0 else next(iter(train_workers() - {first, *struck})))
            os.kill(struck[-1], number)

    stop = threading.Event()
    striker = threading.Thread(target=strike)
    striker.start()
    try:
        yield struck
    finally:
        stop.set()
        striker.join()


def test_a_run_whose_workers_end_is_the_undisturbed_run(
    undisturbed: Path, tmp_path: Path, small: tuple[str, ...]
) -> None:
    """A preemption's SIGTERM and the loss of rank 1 cost no step; that of rank 0 costs those since the checkpoint."""
    run = tmp_path / "run"
    # A checkpoint is always being written, so that each fault falls into one.
    words = (*small, LONG, "run.checkpoint_seconds=0.05", "cluster.num_workers=[1, 2]", "data.slots_per_task=2")
    planned = [(signal.SIGTERM, 0, 5), (signal.SIGKILL, 1, 20), (signal.SIGKILL, 0, 40)]
    with faults(run, *planned) as struck:
        dora_ray.train(dora_ray.load_config("tiny", *words), out=run)
    assert len(set(struck)) == 3
    events = read_lines(str(run / "events.jsonl"))
    starts = [event for event in events if event["event"] == "start"]
    saved = {event["step"]: event["reason"] for event in events if event["event"] == "checkpoint"}
    assert [event["world_size"] for event in starts] == [2, 2, 2, 2]
    assert [event["event"] for event in events].count("failure") == 3
    _, terminated, lost, killed = begun = [event["step"] for event in starts]
    assert begun == sorted(begun)
    assert 5 < terminated < lost < 60
    assert {terminated, lost} <= set(saved)
    assert saved[terminated] == "SIGTERM"
    done = [line["step"] for line in read_lines(str(run / "ledger.jsonl")) if "step" in line]
    before = len(done) - (60 - killed)
    assert lost < killed <= before
    assert done == [*range(before), *range(killed, 60)], "only steps since the last checkpoint were done twice"
    assert same(weights_of(run), weights_of(undisturbed))
    assert read_history(str(run)) == read_history(str(undisturbed))


def test_divergence_stops_all_workers_at_once(tmp_path: Path, small: tuple[str, ...]) -> None:
    config = dora_ray.load_config("tiny", *small, "optim.lr=1e30", "optim.warmup_steps=0", "cluster.num_workers=2")
    with pytest.raises(DivergenceError, match=r"step \d: .* is not finite"):
        dora_ray.train(config, out=tmp_path / "run")
    assert [event["event"] for event in read_lines(str(tmp_path / "run" / "events.jsonl"))].count("start") == 1


def test_more_gpus_than_there_are(tmp_path: Path, small: tuple[str, ...]) -> None:
    config = dora_ray.load_config("tiny", *small, "cluster.num_workers=2", "cluster.use_gpu=true")
    with pytest.raises(ClusterError, match=r"the cluster has 0 GPUs; 2 workers .* need 2 GPUs"):
        dora_ray.train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
