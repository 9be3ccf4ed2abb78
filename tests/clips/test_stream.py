"""The clip stream: the plan's order through threads and through Ray Data, windows, and clips that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dora_ray.clips.plan import Plan
from dora_ray.clips.stream import SlotBatch, local_slots, ray_slots, read_slot
from dora_ray.config import load_config
from dora_ray.training.launch import ingest_videos, make_plan
from tests.conftest import BIKES, SMALL

pytestmark = [pytest.mark.ray]


@pytest.fixture(scope="module")
def plan(ray_cluster, store: Path) -> Plan:
    config = load_config("tiny", *SMALL, f"data.videos=[{BIKES}]")
    return make_plan(config, ingest_videos(config, str(store)))


@pytest.fixture(scope="module")
def damaged(plan: Plan) -> Plan:
    """The plan with a frame whose row does not exist: every clip with it is unreadable, anywhere."""
    (video,) = plan.videos
    broken = plan.slot_clips(0, 1)[0].frames[0]
    rows = video.rows.copy()
    rows[broken] = 10**6
    from dataclasses import replace

    return replace(plan, videos=(replace(video, rows=rows),))


def through_ray(plan: Plan, steps: range, slots: list[int], **changes) -> Iterator[SlotBatch]:
    options = {
        "prefetch": 2,
        "slots_per_task": 1,
        "cpus_per_task": 0.5,
        "num_streams": 1,
        "node_label": None,
        "decode_seconds": 60.0,
    }
    return ray_slots(plan, steps, slots, **(options | changes))


def same(one: SlotBatch, other: SlotBatch) -> bool:
    equal = np.array_equal(one.clips, other.clips) and np.array_equal(one.valid, other.valid)
    return equal and (one.step, one.slot, one.digest) == (other.step, other.slot, other.digest)


def test_slot_holds_the_plans_frames(plan: Plan) -> None:
    batch = read_slot(plan, 3, 1)
    assert batch.clips.shape == (2, 2, 40, 40, 3)
    assert batch.valid.all()
    assert batch.digest == read_slot(plan, 3, 1).digest
    assert batch.digest not in {read_slot(plan, 3, 0).digest, read_slot(plan, 2, 1).digest}


def test_threads_keep_the_order(plan: Plan) -> None:
    keys = [(step, slot) for step in range(3) for slot in (2, 0)]
    batches = list(local_slots(plan, iter(keys), prefetch=3, num_threads=2, decode_seconds=60.0))
    assert [(batch.step, batch.slot) for batch in batches] == keys
    assert all(same(batch, read_slot(plan, *key)) for batch, key in zip(batches, keys, strict=True))


@pytest.mark.parametrize("slots_per_task", [1, 3, 100])
def test_ray_gives_what_the_plan_says(plan: Plan, slots_per_task: int) -> None:
    keys = [(step, slot) for step in range(1, 6) for slot in (1, 3)]
    batches = list(through_ray(plan, range(1, 6), [1, 3], slots_per_task=slots_per_task))
    assert [(batch.step, batch.slot) for batch in batches] == keys
    assert all(same(batch, read_slot(plan, *key)) for batch, key in zip(batches, keys, strict=True))


def test_unreadable_clip_is_marked_and_keeps_its_place(damaged: Plan) -> None:
    batches = list(through_ray(damaged, range(1), [0, 1]))
    assert [(batch.step, batch.slot) for batch in batches] == [(0, 0), (0, 1)]
    bad = batches[1]
    assert not bad.valid[0]
    assert not bad.clips[~bad.valid].any()


def test_stream_that_is_left_early_ends(plan: Plan) -> None:
    stream = through_ray(plan, range(50), [0, 1])
    assert next(stream).step == 0
    stream.close()
