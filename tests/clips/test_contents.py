"""Readable slots: a growing store gives the same keys as the finished one, and clips move off cuts and holes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_ray.clips import contents
from dora_ray.clips.contents import GrowingContents, next_valid
from dora_ray.clips.plan import Plan
from dora_ray.store.frames import ComingVideo, Stored
from tests.clips.plans import starts_of

SIGNATURE = 448


def coming(num_frames: int = 60, segment: int = 10, rate: float = 6.0) -> ComingVideo:
    return ComingVideo(
        video_id="a",
        path="a.mp4",
        uri="",
        pts=np.arange(num_frames),
        times=np.arange(num_frames) / rate,
        edges=np.arange(0, num_frames + 1, segment),
        width=64,
        height=48,
        digest="a",
    )


def plan_of(video: ComingVideo, window_segments: int = 2, **changes) -> Plan:
    plan = Plan(
        videos=(video,),
        num_frames=2,
        stride_seconds=0.5,
        avoid_cuts=True,
        seed=0,
        slots=2,
        clips_per_slot=3,
        clip_size=32,
        clip_scale=(0.2, 1.0),
        aspect_ratio=(0.75, 4 / 3),
        window_segments=window_segments,
    )
    return replace(plan, **changes)


class Store:
    """Fake of `look_up`: `add` stores frames; pictures change at `cuts`."""

    def __init__(self, video: ComingVideo, cuts: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> None:
        self.video, self.missing = video, missing
        self.order: list[int] = []
        generator = np.random.default_rng(0)
        shots = np.cumsum([frame in cuts for frame in range(len(video.pts))])
        pictures = generator.integers(0, 256, (shots[-1] + 1, SIGNATURE), np.uint8)
        self.signatures = pictures[shots]
        self.version = 1

    def add(self, frames: range | list[int]) -> None:
        self.order += list(frames)
        self.version += 1

    def look_up(self, video: ComingVideo) -> Stored:
        count = len(video.pts)
        tried, rows = np.zeros(count, bool), np.full(count, -1)
        tried[self.order] = True
        for row, frame in enumerate(self.order):
            if frame not in self.missing:
                rows[frame] = row
        return Stored(self.version, tried, rows, np.where((rows >= 0)[:, None], self.signatures, 0).astype(np.uint8))


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(contents, "LOOK_TIMES", -1.0)


def growing(plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> GrowingContents:
    monkeypatch.setattr(contents, "look_up", store.look_up)
    return GrowingContents(plan, plan.videos)


def test_a_slot_is_ready_once_all_frames_of_its_window_were_tried(monkeypatch) -> None:
    video = coming()
    plan, store = plan_of(video), Store(video)
    there = growing(plan, store, monkeypatch)
    window = plan.windows(0)[0]
    needed = sorted(
        {f for unit in window.units for f in range(plan.unit_frames(unit)[1], plan.unit_frames(unit)[2] + 1)}
    )
    assert there.key(0, 0) is None
    store.add(needed[:-1])
    assert there.key(0, 0) is None
    store.add(needed[-1:])
    key = there.key(0, 0)
    assert key is not None
    assert key.starts.tolist() == starts_of(plan, plan.slot_numbers(0, 0)).tolist()
    frames = plan.starts[key.starts, 1:]
    assert [[store.order[row] for row in rows] for rows in key.rows] == frames.tolist()


@given(
    seed=st.integers(0, 10**6),
    cuts=st.sets(st.integers(1, 59), max_size=4),
    missing=st.sets(st.integers(0, 59), max_size=6),
)
def test_rows_of_a_clip_do_not_depend_on_the_order_of_the_ingest(seed, cuts, missing) -> None:
    video = coming()
    plan = plan_of(video)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "LOOK_SECONDS", -1.0)
        patch.setattr(contents, "LOOK_TIMES", -1.0)
        for order in (np.arange(6), np.random.default_rng(seed).permutation(6)):
            store = Store(video, tuple(cuts), tuple(missing))
            there = growing(plan, store, patch)
            keys: dict[tuple[int, int], list[int]] = {}
            for segment in order:
                store.add(range(segment * 10, segment * 10 + 10))
                for step in range(9):
                    for slot in range(2):
                        key = there.key(step, slot)
                        if key is not None:
                            starts = keys.setdefault((step, slot), key.starts.tolist())
                            assert starts == key.starts.tolist()
            found.append(keys)
    assert found[0] == found[1]
    assert len(found[0]) == 18


def test_clips_move_off_cuts_and_holes_within_their_window(monkeypatch) -> None:
    video = coming()
    plan, store = plan_of(video), Store(video, cuts=(25,), missing=(41,))
    there = growing(plan, store, monkeypatch)
    store.add(range(60))
    moved = 0
    for number in range(plan.clips_per_epoch // 6 * 6):
        step, place = divmod(number, 6)
        key = there.key(step, place // 3)
        assert key is not None
        start = int(key.starts[place % 3])
        frames = plan.starts[start, 1:].tolist()
        assert 41 not in frames
        assert not frames[0] < 25 <= frames[-1]
        window, at = plan.place(number)
        assert start in window.rows
        moved += start != window.rows[at]
    assert moved > 0


def test_a_window_without_readable_clips(monkeypatch) -> None:
    video = coming()
    plan, store = plan_of(video), Store(video, missing=tuple(range(60)))
    there = growing(plan, store, monkeypatch)
    store.add(range(60))
    key = there.key(0, 0)
    assert key is not None
    assert (key.starts == -1).all()


@given(order=st.permutations(range(12)), valid=st.sets(st.integers(0, 11)))
def test_next_valid_is_its_definition(order, valid) -> None:
    found = next_valid(np.array(order), np.array(sorted(valid), np.int64))
    for place in range(12):
        following = [order[(place + i) % 12] for i in range(12) if order[(place + i) % 12] in valid]
        assert found[place] == (following[0] if following else -1)
