"""A Ray worker that is told to end, as a preemption does, saves first: the run goes on, and no step is done again."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

import dora_ray
from dora_ray.training.journal import read_history, read_lines
from tests.training.test_train_local import same, weights_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_sigterm_to_a_worker_loses_no_step(tmp_path: Path, small: tuple[str, ...]) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    words = (*small, "optim.steps=30", "run.checkpoint_seconds=600")
    dora_ray.train(dora_ray.load_config("tiny", *words), out=undisturbed)
    told: list[int] = []

    def tell_rank_0_to_end() -> None:
        while not told and not stop.wait(0.05):
            if len(read_lines(str(run / "metrics.jsonl"))) > 5:
                events = read_lines(str(run / "events.jsonl"))
                told.append(next(event["pid"] for event in events if event["event"] == "start"))
                os.kill(told[0], signal.SIGTERM)

    stop = threading.Event()
    teller = threading.Thread(target=tell_rank_0_to_end)
    teller.start()
    try:
        dora_ray.train(dora_ray.load_config("tiny", *words, "cluster.num_workers=[1, 2]"), out=run)
    finally:
        stop.set()
        teller.join()
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
