"""Trainings on a real Ray cluster: any number of workers, and a worker killed or told to end, give the same bits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dora_ray
from dora_ray.errors import ClusterError, DivergenceError
from dora_ray.training.records.journal import read_history, read_lines, read_metrics
from tests.training.test_train_local import same, weights_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path, ray_cluster) -> Path:
    """The run that the others are compared with, in this process."""
    from tests.conftest import BIKES, SMALL

    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    config = dora_ray.load_config("tiny", *SMALL, f"data.videos=[{BIKES}]", f"data.store={store}", "optim.steps=30")
    dora_ray.train(config, out=run)
    return run


def test_three_workers_that_do_not_divide_the_slots(undisturbed: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    config = dora_ray.load_config("tiny", *small, "optim.steps=30", "cluster.num_workers=3")
    result = dora_ray.train(config, out=tmp_path / "run")
    assert result.metrics["world_size"] == 3
    assert same(weights_of(tmp_path / "run"), weights_of(undisturbed))
    assert read_history(result.path) == read_history(str(undisturbed))
    check_waits(read_metrics(result.path))
    dora_ray.train(dora_ray.load_config(config, "cluster.num_workers=1"), out=tmp_path / "run", resume=True)
    assert same(weights_of(tmp_path / "run"), weights_of(undisturbed))


def check_waits(lines: list[dict[str, Any]]) -> None:
    """Every line says how long the slowest rank waited, and by Ray Data's stages for what."""
    stages = ("production_wait", "data_transfer", "batching", "format", "collate", "finalize")
    blocked = [sum(line[f"blocked_{stage}_seconds"] for stage in stages) for line in lines]
    exposed = [line["exposed_wait_seconds"] for line in lines]
    assert min(exposed) >= 0
    # The first line's stages begin with the stream, while the networks are still made.
    assert blocked[0] > 0
    assert sum(blocked[1:]) <= sum(exposed[1:]) + 0.05 * len(lines)


def train_workers() -> set[int]:
    """The processes of Ray Train's workers that this process's cluster runs."""
    import psutil  # Ray brings it along

    return {child.pid for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in child.name()}


@contextmanager
def rank_gets(number: signal.Signals, run: Path, *, rank: int, when: Callable[[], bool]) -> Iterator[list[int]]:
    """A signal to the process of a run's first rank 0 or 1, once, while the block trains; the processes that got it."""
    struck: list[int] = []

    def strike() -> None:
        while not struck and not stop.wait(0.05):
            if when():
                events = read_lines(str(run / "events.jsonl"))
                first = next(event["pid"] for event in events if event["event"] == "start")
                struck.append(first if rank == 0 else next(iter(train_workers() - {first})))
                os.kill(struck[0], number)

    stop = threading.Event()
    striker = threading.Thread(target=strike)
    striker.start()
    try:
        yield struck
    finally:
        stop.set()
        striker.join()


def test_killed_worker_costs_nothing_but_time(undisturbed: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    config = dora_ray.load_config(
        "tiny",
        *small,
        "optim.steps=30",
        "cluster.num_workers=[1, 2]",
        "run.checkpoint_seconds=0.05",
        "data.slots_per_task=2",
    )

    def has_a_checkpoint() -> bool:
        return any(event["event"] == "checkpoint" for event in read_lines(str(run / "events.jsonl")))

    with rank_gets(signal.SIGKILL, run, rank=0, when=has_a_checkpoint) as killed:
        dora_ray.train(config, out=run)
    events = read_lines(str(run / "events.jsonl"))
    assert killed
    assert [event["event"] for event in events].count("start") >= 2
    assert any(event["event"] == "failure" for event in events)
    assert same(weights_of(run), weights_of(undisturbed))
    assert read_history(str(run)) == read_history(str(undisturbed))


def test_sigterm_to_a_worker_loses_no_step(undisturbed: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    """As a preemption does: it saves first, the run goes on, and no step is done again."""
    run = tmp_path / "run"
    words = (*small, "optim.steps=30", "run.checkpoint_seconds=600", "cluster.num_workers=[1, 2]")
    with rank_gets(signal.SIGTERM, run, rank=0, when=lambda: len(read_lines(str(run / "metrics.jsonl"))) > 5) as told:
        dora_ray.train(dora_ray.load_config("tiny", *words), out=run)
    assert told
    events = read_lines(str(run / "events.jsonl"))
    starts = [event for event in events if event["event"] == "start"]
    saved = [event for event in events if event["event"] == "checkpoint"]
    assert [event["world_size"] for event in starts] == [2, 2]
    assert [event["reason"] for event in saved] == ["SIGTERM", "end"]
    assert starts[1]["step"] == saved[0]["step"] < 30
    done = [line["step"] for line in read_lines(str(run / "ledger.jsonl")) if "step" in line]
    assert done == list(range(30)), "a step was done twice"
    assert same(weights_of(run), weights_of(undisturbed))
    assert read_history(str(run)) == read_history(str(undisturbed))


def test_a_worker_killed_beside_rank_0_costs_no_step(undisturbed: Path, tmp_path: Path, small: tuple[str, ...]) -> None:
    """Rank 0 misses it in the next sum, and saves what both had."""
    run = tmp_path / "run"
    words = (*small, "optim.steps=30", "run.checkpoint_seconds=600", "cluster.num_workers=[1, 2]")
    done_5 = lambda: len(read_lines(str(run / "metrics.jsonl"))) > 5  # noqa: E731
    with rank_gets(signal.SIGKILL, run, rank=1, when=done_5) as killed:
        dora_ray.train(dora_ray.load_config("tiny", *words), out=run)
    assert killed
    events = read_lines(str(run / "events.jsonl"))
    starts = [event for event in events if event["event"] == "start"]
    saved = [event for event in events if event["event"] == "checkpoint"]
    assert [event["reason"] for event in saved] == ["lost worker", "end"]
    assert len(starts) == 2
    assert 0 < starts[1]["step"] == saved[0]["step"] < 30
    done = [line["step"] for line in read_lines(str(run / "ledger.jsonl")) if "step" in line]
    assert done == list(range(30)), "a step was done twice"
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
