"""Clip stream without Ray: the plan's order with threads, unreadable clips, hanging reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dora_ray.clips import slot as slots
from dora_ray.clips.contents import SlotKey, pack, unpack
from dora_ray.clips.loader import local_slots
from dora_ray.clips.slot import SlotBatch, read_slot
from dora_ray.training.inputs import Inputs
from tests.clips.plans import key_of, stored_inputs, without_row


@pytest.fixture(scope="module")
def inputs(store: Path, ray_cluster) -> Inputs:
    return stored_inputs(store)


def same(one: SlotBatch, other: SlotBatch) -> bool:
    equal = np.array_equal(one.clips, other.clips) and np.array_equal(one.valid, other.valid)
    return equal and (one.step, one.slot, one.digest) == (other.step, other.slot, other.digest)


def keys_of(inputs: Inputs, keys: list[tuple[int, int]]) -> Iterator[SlotKey | None]:
    return (inputs.contents.key(*key) for key in keys)


def test_slot_holds_the_plans_frames(inputs: Inputs) -> None:
    batch = read_slot(inputs.contents, key_of(inputs.contents, 3, 1))
    assert batch.clips.shape == (2, 2, 40, 40, 3)
    assert batch.valid.all()
    others = {read_slot(inputs.contents, key_of(inputs.contents, *key)).digest for key in ((3, 0), (2, 1))}
    assert batch.digest not in others


def test_packed_keys_are_unpacked(inputs: Inputs) -> None:
    keys = [key_of(inputs.contents, 3, slot) for slot in range(3)]
    for one, other in zip(keys, unpack(pack(keys), inputs.plan), strict=True):
        assert (one.step, one.slot) == (other.step, other.slot)
        for name in ("starts", "versions", "rows"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_threads_keep_the_order(inputs: Inputs) -> None:
    keys = [(step, slot) for step in range(3) for slot in (2, 0)]
    batches = list(local_slots(inputs.contents, keys_of(inputs, keys), prefetch=3, num_threads=2, decode_seconds=60.0))
    assert [(batch.step, batch.slot) for batch in batches] == keys
    assert all(
        same(batch, read_slot(inputs.contents, key_of(inputs.contents, *key)))
        for batch, key in zip(batches, keys, strict=True)
    )


def test_keys_that_are_not_there_yet_are_waited_for(inputs: Inputs) -> None:
    """Slots read before the hung ones are delivered meanwhile."""
    told = threading.Event()

    def keys() -> Iterator[SlotKey | None]:
        yield key_of(inputs.contents, 0, 0)
        while not told.is_set():
            yield None
        yield key_of(inputs.contents, 0, 1)

    stream = local_slots(inputs.contents, keys(), prefetch=4, num_threads=1, decode_seconds=60.0)
    assert next(stream).slot == 0
    told.set()
    assert next(stream).slot == 1
    assert next(stream, None) is None


def test_unreadable_clip_is_marked_and_keeps_its_place(inputs: Inputs) -> None:
    broken = without_row(inputs, 0, 1)
    keys = [(0, 0), (0, 1), (0, 2)]
    batches = list(local_slots(broken.contents, keys_of(broken, keys), prefetch=2, num_threads=1, decode_seconds=60.0))
    assert [(batch.step, batch.slot) for batch in batches] == keys
    assert [batch.valid.tolist() for batch in batches] == [[True, True], [False, True], [True, True]]
    assert not batches[1].clips[0].any()


def test_threads_that_hang_are_left_behind(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread: the second hung slot hangs before the first one is retried."""
    released, hangs = threading.Event(), [(0, 0), (0, 1)]
    bad = [key_of(inputs.contents, *key).rows[0] for key in hangs]
    plain = slots.read_rows

    def hanging(video, version, rows):
        if any(np.array_equal(rows, other) for other in bad):
            released.wait()
        return plain(video, version, rows)

    monkeypatch.setattr(slots, "read_rows", hanging)
    keys = [(0, 0), (0, 1), (0, 2)]
    try:
        # A good clip gets five seconds, on a machine that may stall for two.
        batches = list(
            local_slots(inputs.contents, keys_of(inputs, keys), prefetch=2, num_threads=1, decode_seconds=5.0)
        )
    finally:
        released.set()
    assert [bool(batch.valid[0]) for batch in batches] == [key not in hangs for key in keys]
    assert all(batch.valid[1] and batch.final for batch in batches)


def test_copying_a_dataset_takes_no_time_of_its_clips(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy for data.cache has no time limit, since no clip has begun."""
    begun: list[int] = []
    real = slots.fetch
    monkeypatch.setattr(slots, "fetch", lambda *place: (begun.append(len(begun)), real(*place)))

    class Watch:
        given_up = ()

        def begin(self, item: int) -> None:
            assert begun

    slots.read_slots(inputs.contents, [key_of(inputs.contents, 0, 0)], Watch())


def test_a_stream_that_is_left_early_ends_its_threads(inputs: Inputs) -> None:
    before = threading.active_count()
    keys = [(step, 0) for step in range(50)]
    stream = local_slots(inputs.contents, keys_of(inputs, keys), prefetch=2, num_threads=2, decode_seconds=60.0)
    assert next(stream).step == 0
    stream.close()
    assert threading.active_count() <= before
