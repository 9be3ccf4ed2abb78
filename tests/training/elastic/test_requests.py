"""Requests between two steps, and the signals that make them: a training that is told to end loses no step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dora_ray
from dora_ray.errors import ClusterError
from dora_ray.training import worker, worlds
from dora_ray.training.elastic import requests as module
from dora_ray.training.elastic.requests import Request, Requests, here
from dora_ray.training.loop import Loop
from dora_ray.training.records.journal import Journal, read_lines
from dora_ray.training.worker import OneRankError, _named_limits
from dora_ray.training.worlds import RayWorld
from tests.conftest import BIKES, SMALL
from tests.training.records.test_checkpoint import PLAN, local_world
from tests.training.test_train_local import same, weights_of


def test_the_larger_request_counts() -> None:
    requests = Requests()
    requests.make(Request.LEAVE, "resize")
    requests.make(Request.NOTICE, "preemption")
    assert requests.pending() is Request.LEAVE
    assert requests.take(Request.LEAVE) == "resize"
    assert requests.pending() is Request.NONE


def test_a_request_made_meanwhile_is_kept() -> None:
    """All ranks agreed on a checkpoint by the clock while this one was being told to leave."""
    requests = Requests()
    requests.make(Request.LEAVE, "resize")
    assert requests.take(Request.INTERVAL) == "interval"
    assert requests.pending() is Request.LEAVE


def test_who_asks_to_leave_hears_of_it() -> None:
    requests = Requests()
    assert requests.leave("resize") is None
    assert requests.take(Request.LEAVE) == "resize"
    assert requests.leave("resize") is None, "it is saving"
    assert requests.pending() is Request.NONE, "and is not asked for every answer"
    requests.left()
    assert requests.leave("resize") is True
    assert requests.leave("abort") is True, "it has left already"
    assert requests.pending() is Request.NONE
    requests.stay()
    assert requests.leave("resize") is None
    assert requests.pending() is Request.LEAVE


def test_who_ends_the_run_is_heard_at_once() -> None:
    requests = Requests()
    assert requests.leave("resize") is None
    requests.take(Request.LEAVE)
    assert requests.leave("abort") is None
    assert requests.take(Request.LEAVE) == "abort"


def test_nobody_waits_for_a_training_that_ended_with_an_error() -> None:
    """Another rank was killed after this one had begun to leave: nobody takes the request any more."""
    requests = Requests()
    assert requests.leave("resize") is None
    requests.ended()
    assert requests.leave("resize") is False


def test_who_could_not_leave_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests()
    requests.leave("resize")
    requests.take(Request.LEAVE)
    monkeypatch.setattr(module, "ASK_AGAIN_SECONDS", 0.0)
    assert requests.leave("resize") is None
    assert requests.take(Request.LEAVE) == "resize"


class Steps(Loop):
    """A training of requests instead of steps."""

    requests: list[Request]

    def _step(self) -> Request:
        self.state.step += 1
        return self.requests[self.state.step - 1]

    def _save(self, reason: str) -> None:
        pass


class Writer:
    """Fails at first."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def failed(self) -> bool:
        self.failures -= 1
        return self.failures >= 0

    def finish(self) -> None:
        pass


@pytest.mark.parametrize(("reason", "left_at"), [("resize", 3), ("abort", 2)])
def test_a_resize_waits_for_a_checkpoint_that_can_be_written(
    reason: str, left_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All since the last one would be lost; whoever ends the run does not wait."""
    job = worlds.Job(dora_ray.load_config("tiny", *SMALL, "optim.steps=4"), PLAN, str(tmp_path))
    journal = Journal(str(tmp_path), step=0, num_steps=4, world_size=1, entered=time.time())
    state, left = SimpleNamespace(step=0), []
    world = local_world(job)
    monkeypatch.setattr(world, "leave", lambda: left.append(state.step))
    monkeypatch.setattr(here, "take", lambda request: reason)
    loop = Steps(job, world, state, journal, stream=iter(()))
    loop.requests = [Request.NONE, Request.LEAVE, Request.LEAVE, Request.NONE]
    loop._writer = Writer(failures=1)
    loop.run()
    assert left[0] == left_at


def test_a_checkpoint_that_is_never_done_is_told_once(tmp_path: Path) -> None:
    """While one is written no other begins: if that hangs, a kill would cost all since then."""
    job = worlds.Job(dora_ray.load_config("tiny", *SMALL, "run.checkpoint_seconds=10"), PLAN, str(tmp_path))
    journal = Journal(str(tmp_path), step=0, num_steps=4, world_size=1, entered=time.time())
    state = SimpleNamespace(step=3)
    loop = Loop(job, local_world(job), state, journal, stream=iter(()))
    loop._writer = SimpleNamespace(busy=lambda: True)

    def warnings() -> list[str]:
        return [line["message"] for line in read_lines(str(tmp_path / "events.jsonl")) if line["event"] == "warning"]

    loop._saved_at = time.monotonic() - 30
    assert loop._request() is Request.NONE
    assert not warnings()
    loop._saved_at = time.monotonic() - 60
    assert [loop._request(), loop._request()] == [Request.NONE] * 2
    assert len(warnings()) == 1
    assert "60 s ago is still being written" in warnings()[0]
    loop._writer = SimpleNamespace(busy=lambda: False)
    assert loop._request() is Request.INTERVAL


def test_who_waits_for_the_end_of_a_training_that_goes_on_does_not_wait_long() -> None:
    requests = Requests()
    assert not requests.wait_for_end(notice_seconds=0.01, seconds=60.0)
    requests.noticed()
    assert not requests.wait_for_end(notice_seconds=60.0, seconds=0.01)
    requests.ended()
    assert requests.wait_for_end(notice_seconds=60.0, seconds=60.0)
    requests.left()
    assert not requests.wait_for_end(notice_seconds=60.0, seconds=60.0), "all is saved, and it waits itself"


def test_who_left_before_a_deadline_stays_until_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train ends the workers at the deadline: who trains on before it does steps that are lost."""
    monkeypatch.setattr(worlds, "LEAVE_SECONDS", 0.1)
    journal = Journal(str(tmp_path), step=0, num_steps=9, world_size=1, entered=time.time())
    job = worlds.Job(dora_ray.load_config("tiny", *SMALL), PLAN, str(tmp_path))
    world = RayWorld.__new__(RayWorld)
    world.rank, world.size = 0, 1
    loop = Loop(job, world, state=SimpleNamespace(step=0), journal=journal, stream=iter(()))
    deadline = time.time() + 1.0  # within the margin
    monkeypatch.setattr(here, "deadline", deadline)
    assert loop._request() is Request.LEAVE
    assert here.take(Request.LEAVE) == "deadline"
    loop.world.leave()
    assert time.time() > deadline
    assert loop._request() is Request.NONE, "nobody came: training goes on"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("of memory: none"), RuntimeError("CUDA error: out of memory")]
)
def test_whatever_runs_out_of_memory_names_the_slot_size(error: Exception) -> None:
    config = dora_ray.load_config("tiny", *SMALL)
    with (
        pytest.raises(OneRankError, match=r"ran out of memory \(.*lower optim.clips_per_slot=2"),
        _named_limits(config),
    ):
        raise error
    with pytest.raises(OneRankError, match="Unable to allocate"), _named_limits(config):
        np.empty(2**50)
    with pytest.raises(RuntimeError, match="something else"), _named_limits(config):
        raise RuntimeError("something else")


def test_what_a_graph_cannot_record_names_the_setting() -> None:
    config = dora_ray.load_config("tiny", *SMALL)
    with (
        pytest.raises(OneRankError, match=r"cannot be a CUDA graph \(CUDA error: op.* set optim.cuda_graph=false"),
        _named_limits(config),
    ):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
    ended = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    ended.__context__ = torch.OutOfMemoryError("2 GiB asked")
    with pytest.raises(OneRankError, match=r"ran out of memory \(2 GiB asked\)"), _named_limits(config):
        raise ended


STALLED = """
import ctypes
from dora_ray.config import load_config
from dora_ray.training.loop import watch_for_stalls

def a_step_that_hangs():
    ctypes.PyDLL(None).sleep(60)  # holding the interpreter's lock

watch_for_stalls(load_config("tiny", "cluster.stall_seconds=1.5", "data.decode_seconds=0.1"))
a_step_that_hangs()
"""


def test_a_step_that_hangs_ends_its_process_and_says_where() -> None:
    done = subprocess.run([sys.executable, "-c", STALLED], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert "Timeout (0:00:01.5" in done.stderr
    assert "in a_step_that_hangs" in done.stderr


def test_what_one_rank_alone_has_met_ends_the_run_after_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray starts the workers again after its exception: what they find in status.json they return to the launcher."""

    def run_out(job: worlds.Job, world: object) -> None:
        raise OneRankError(ClusterError("a worker ran out of memory: lower optim.clips_per_slot=2"))

    monkeypatch.setattr(worker, "RayWorld", lambda job, contents: SimpleNamespace(rank=1))
    monkeypatch.setattr(worker, "train_loop", run_out)
    job = worlds.Job(dora_ray.load_config("tiny", *SMALL), PLAN, str(tmp_path))
    arguments = {"job": job, "contents": None}
    with pytest.raises(OneRankError):
        worker.ray_worker(arguments)
    error = worker.ray_worker(arguments)
    assert type(error) is ClusterError
    assert "lower optim.clips_per_slot=2" in str(error)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path, ray_cluster) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    dora_ray.train(dora_ray.load_config("tiny", *SMALL, *FORTY_STEPS, f"data.store={store}"), out=run)
    return run


FORTY_STEPS = (f"data.videos=[{BIKES}]", "optim.steps=40")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_first(
    number: signal.Signals, status: int, undisturbed: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*SMALL, *FORTY_STEPS, f"data.store={store}")
    command = [sys.executable, "-m", "dora_ray", "train", "tiny", *words, "--out", str(run)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(read_lines(str(run / "metrics.jsonl"))) < 6:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    done = [line["step"] for line in read_lines(str(run / "ledger.jsonl")) if "step" in line]
    saved = [event for event in read_lines(str(run / "events.jsonl")) if event["event"] == "checkpoint"]
    assert [event["reason"] for event in saved] == [number.name]
    assert saved[0]["step"] == done[-1] + 1
    assert saved[0]["step"] < 40
    dora_ray.train(out=run, resume=True)
    assert same(weights_of(run), weights_of(undisturbed))


OUT_OF_MEMORY = """
import resource, sys
import dora_ray
from dora_ray.training import loop

plain = loop.sum_slots

def with_little_memory(*arguments):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 300_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return plain(*arguments)

loop.sum_slots = with_little_memory
dora_ray.train(dora_ray.load_config("tiny", *sys.argv[2:]), out=sys.argv[1])
"""


@pytest.mark.slow
def test_out_of_memory_names_the_slot_size(tmp_path: Path, store: Path, ray_cluster) -> None:
    """The operating system refuses the memory of the first forward."""
    large = ("model.width=384", "crops.global_size=96", "optim.clips_per_slot=16", "cluster.num_workers=0")
    words = (*SMALL, f"data.videos=[{BIKES}]", f"data.store={store}", *large)
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path / "run"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "OneRankError: a worker ran out of memory" in done.stderr
    assert "lower optim.clips_per_slot=16" in done.stderr
