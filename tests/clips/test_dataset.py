"""Clip stream as a Ray Data dataset: the plan's order for every world size, failures, and waiting for the ingest."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_ray.clips import dataset, rank_stream
from dora_ray.clips import slot as slots
from dora_ray.clips.contents import SlotKey
from dora_ray.clips.dataset import Begin, StreamSettings, deal, make_clips, row_slots
from dora_ray.clips.plan import slots_of_rank
from dora_ray.clips.rank_stream import RankStream
from dora_ray.clips.slot import SlotBatch, read_slot
from dora_ray.errors import VideoError
from dora_ray.ray_internals import attempt_number
from dora_ray.training.inputs import Inputs
from dora_ray.video.synthetic import make_video
from tests.clips.plans import key_of, stored_inputs, without_row
from tests.clips.test_loader import same

SETTINGS = StreamSettings(
    run="test",
    num_steps=6,
    slots_per_task=1,
    prefetch=1,
    decode_cpus=0.5,
    decode_label=None,
    decode_seconds=60.0,
)


@pytest.fixture(scope="module")
def inputs(store: Path, ray_cluster) -> Inputs:
    return stored_inputs(store)


def streams(inputs: Inputs, size: int, **changes: Any) -> list[RankStream]:
    """Return the streams of a group's ranks, which share one dataset."""
    import ray

    settings = replace(SETTINGS, run=uuid.uuid4().hex, **changes)
    reference = (ray.put(inputs.contents),)
    shards = deal(make_clips(reference, settings), size)
    return [RankStream(shard, inputs.plan, settings, rank=rank, size=size) for rank, shard in enumerate(shards)]


def take(ranks: list[RankStream], begin: int, expected: int | None = None) -> list[list[list[SlotBatch]]]:
    """Return the slots that each rank receives, step by step; ranks synchronize at every step, as in an all-reduce."""
    barrier = threading.Barrier(len(ranks))

    def run(stream: RankStream) -> list[list[SlotBatch]]:
        stream.start(begin if expected is None else expected)
        steps = []
        try:
            for step in stream.steps(begin):
                steps.append(step)
                barrier.wait(600)
        except BaseException:
            barrier.abort()
            raise
        return steps

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


@given(size=st.integers(1, 6), slots=st.integers(1, 7), per_task=st.integers(1, 9), begin=st.integers(0, 3))
def test_rows_hold_every_slot_once_in_the_ranks_turns(size, slots, per_task, begin) -> None:
    rows = list(row_slots(Begin(begin, size), replace(SETTINGS, slots_per_task=per_task), slots))
    total = (SETTINGS.num_steps - begin) * slots
    assert sorted(slot for row in rows for slot in row) == list(range(total))
    given_to: list[list[int]] = [[] for _ in range(size)]
    for number, row in enumerate(rows):
        given_to[number % size] += row
    for rank, found in enumerate(given_to):
        steps = range(begin, SETTINGS.num_steps)
        mine = [
            (step - begin) * slots + slot
            for step in steps
            for slot in slots_of_rank(rank, size, slots, step=step, begin=begin)
        ]
        assert found == mine


@pytest.mark.ray
@pytest.mark.parametrize(("size", "slots_per_task"), [(1, 1), (1, 5), (3, 1), (3, 2)])
def test_every_rank_is_given_the_plans_slots(inputs: Inputs, size: int, slots_per_task: int) -> None:
    """Three ranks do not divide four slots."""
    found = take(streams(inputs, size, slots_per_task=slots_per_task), 2)
    batches = sorted((batch for rank in found for step in rank for batch in step), key=lambda b: (b.step, b.slot))
    assert [(batch.step, batch.slot) for batch in batches] == [(s, slot) for s in range(2, 6) for slot in range(4)]
    for batch in batches:
        assert same(batch, read_slot(inputs.contents, key_of(inputs.contents, batch.step, batch.slot)))


@pytest.mark.ray
def test_the_streams_operators_have_names_that_say_what_they_do(inputs: Inputs, capsys: pytest.CaptureFixture) -> None:
    import ray

    make_clips((ray.put(inputs.contents),), SETTINGS).explain()
    optimized = capsys.readouterr().out.rpartition("Physical Plan (Optimized)")[2]
    assert re.findall(r"TaskPoolMapOperator\[(.*)\]", optimized) == ["MapBatches(RowReader)", "ReadSlotRows"]


@pytest.mark.ray
def test_a_stream_begins_anew_where_the_checkpoint_was_another(inputs: Inputs) -> None:
    found = take(streams(inputs, 2), 3, expected=5)
    assert [batch.step for step in found[0] for batch in step] == [3, 3, 4, 4, 5, 5]


@pytest.mark.ray
def test_executions_follow_each_other(inputs: Inputs) -> None:
    """Reuse the same shard when no new one is created."""
    (found,) = take(streams(inputs, 1, execution_rows=8), 0)
    keys = [(batch.step, batch.slot) for step in found for batch in step]
    assert keys == [(step, slot) for step in range(6) for slot in range(4)]


@pytest.mark.ray
def test_unreadable_clip_is_marked_and_keeps_its_place(inputs: Inputs) -> None:
    (found,) = take(streams(without_row(inputs, 1, 2), 1, num_steps=2), 0)
    valid = {(batch.step, batch.slot): batch.valid.tolist() for step in found for batch in step}
    assert valid.pop((1, 2)) == [False, True]
    assert set(map(tuple, valid.values())) == {(True, True)}


class Waiting:
    """Contents that are never fully stored."""

    def __init__(self, inputs: Inputs) -> None:
        self.plan, self.videos = inputs.plan, inputs.contents.videos

    def key(self, step: int, slot: int) -> SlotKey | None:
        return None


@pytest.mark.ray
def test_a_source_whose_ingest_failed_ends_the_stream_with_the_reason(inputs: Inputs) -> None:
    (stream,) = streams(Inputs(inputs.plan, Waiting(inputs)), 1)
    dataset.publish_ingest_end(stream._settings.run, VideoError("walk.mp4: the disk is gone"))
    stream.start(0)
    with pytest.raises(VideoError, match=r"^walk\.mp4: the disk is gone$"):
        next(stream.steps(0))


@pytest.mark.ray
def test_a_rank_that_waits_for_the_ingest_is_alive(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_stream, "WAIT_SECONDS", 0.5)
    (stream,) = streams(Inputs(inputs.plan, Waiting(inputs)), 1)
    alive = threading.Event()
    stream._is_alive = alive.set
    stream.start(0)
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(VideoError) as error:
            next(stream.steps(0))
        ended.append(str(error.value))

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert alive.wait(600)
    dataset.publish_ingest_end(stream._settings.run, VideoError("over"))
    waiting.join(600)
    assert ended == ["over"]


def faulty(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Run tasks through `act`, which is pickled with them."""
    reader = dataset.RowReader.__call__

    def call(self: dataset.RowReader, rows: Any) -> Iterator[dict[str, Any]]:
        with pytest.MonkeyPatch.context() as patch:
            plain = slots.read_rows
            patch.setattr(slots, "read_rows", lambda video, version, found: act(plain, video, version, found))
            yield from reader(self, rows)

    class FaultyReader(dataset.RowReader):
        __call__ = call

    monkeypatch.setattr(dataset, "RowReader", FaultyReader)


@pytest.mark.ray
@pytest.mark.slow
def test_a_task_whose_process_is_killed_costs_no_clip(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the process as Ray's memory monitor would; the current clip itself is readable."""

    def die(plain, video, version, rows):
        if attempt_number() < 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(video, version, rows)

    faulty(monkeypatch, die)
    # A task that restarts only after its time limit counts as hung: processes start slowly on a busy machine.
    (found,) = take(streams(inputs, 1, num_steps=1, decode_seconds=1200.0), 0)
    assert [batch.slot for step in found for batch in step] == [0, 1, 2, 3]
    assert all(batch.valid.all() for step in found for batch in step)


@pytest.mark.ray
@pytest.mark.slow
def test_a_clip_that_hangs_with_the_interpreters_lock_is_given_up(inputs: Inputs, monkeypatch) -> None:
    bad = key_of(inputs.contents, 0, 1).rows[1].tolist()

    def hang(plain, video, version, rows):
        if rows.tolist() == bad:
            import ctypes

            ctypes.PyDLL(None).sleep(600)
        return plain(video, version, rows)

    faulty(monkeypatch, hang)
    (found,) = take(streams(inputs, 1, num_steps=2, decode_seconds=5.0), 0)
    valid = {(batch.step, batch.slot): batch.valid.tolist() for step in found for batch in step}
    assert list(valid) == [(step, slot) for step in range(2) for slot in range(4)]
    assert [key for key, clips in valid.items() if not all(clips)] == [(0, 1)]
    assert valid[0, 1] == [True, False]


HALF_SECONDS = ("clip.stride_seconds=0.5",)
# Runs a cluster of several nodes in its own process, because this process belongs to the other tests' cluster.
LOST_NODE = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from dora_ray.clips import dataset, rank_stream
from tests.clips.plans import key_of, stored_inputs
from tests.clips.test_dataset import HALF_SECONDS, streams
from dora_ray.clips.slot import read_slot

film, store, places = sys.argv[1:]
inputs = stored_inputs(store, *HALF_SECONDS, videos=film)
plain = dataset.RowReader.__call__

class Noted(dataset.RowReader):
    def __call__(self, rows):
        (Path(places) / ray.get_runtime_context().get_node_id()).touch()
        yield from plain(self, rows)

dataset.RowReader = Noted
# A killed node's raylet refuses connections; two refusals suffice, where Ray waits for five.
quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 2}
head = {"num_cpus": 2, "object_store_memory": 200_000_000, "_system_config": quick}
cluster = Cluster(initialize_head=True, head_node_args=head)
decoders = [
    cluster.add_node(num_cpus=2, object_store_memory=200_000_000, labels={"role": "decode"}) for _ in range(2)
]
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
(stream,) = streams(inputs, 1, num_steps=30, decode_label="decode", decode_cpus=1.0)
stream.start(0)
digests = []
for batches in stream.steps(0):
    digests += [batch.digest for batch in batches]
    if len(digests) == 40:
        at_work = {path.name for path in Path(places).iterdir()}
        cluster.remove_node(next(node for node in decoders if node.node_id in at_work), allow_graceful=False)
keys = [(step, slot) for step in range(30) for slot in range(4)]
expected = [read_slot(inputs.contents, key_of(inputs.contents, *key)).digest for key in keys]
ray.shutdown()
cluster.shutdown()
pinned, used = {node.node_id for node in decoders}, {path.name for path in Path(places).iterdir()}
outcome = "same" if digests == expected else "different"
print(outcome, len(digests), "pinned", len(used & pinned), "elsewhere", len(used - pinned))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_decode_node_costs_its_rows_once_more(ray_cluster, tmp_path: Path) -> None:
    film = make_video(
        tmp_path / "walk.mp4", width=160, height=96, num_frames=480, frames_per_second=24, seed=1, group_size=24
    )
    stored_inputs(tmp_path / "store", *HALF_SECONDS, videos=str(film))
    places = tmp_path / "places"
    places.mkdir()
    words = [sys.executable, "-c", LOST_NODE, str(film), str(tmp_path / "store"), str(places)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert result.stdout.strip().endswith("same 120 pinned 2 elsewhere 0"), result.stdout + result.stderr


@pytest.mark.ray
def test_a_consumer_that_stops_holds_little_of_the_store(inputs: Inputs) -> None:
    """Ready rows are held back at READY_SHARE, however many the source could yield."""
    import ray

    # Two tasks at a time; with more, this cluster would keep starting new processes.
    (stream,) = streams(inputs, 1, num_steps=400, decode_cpus=2.0)
    stream.start(0)
    steps = stream.steps(0)
    next(steps)
    time.sleep(6)
    used = ray.cluster_resources()["object_store_memory"] - ray.available_resources().get("object_store_memory", 0.0)
    assert used < 0.5 * ray.cluster_resources()["object_store_memory"]
    assert np.all([batch.valid.all() for batch in next(steps)])
