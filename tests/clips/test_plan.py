"""Plan: every clip once per epoch, the same for every number of workers, none across a cut or a hole."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_ray.clips.plan import (
    Plan,
    Purpose,
    clip_table,
    no_clip,
    refuse_without_clips,
    slot_generator,
    slot_seed,
    slots_of_rank,
)
from dora_ray.errors import VideoError
from dora_ray.store.frames import StoredVideo


def stored(num_frames: int, name: str = "a", rate: float = 6.0, cuts: tuple[int, ...] = ()) -> StoredVideo:
    flags = np.zeros(num_frames, bool)
    flags[list(cuts)] = True
    return StoredVideo(
        video_id=name,
        path=f"{name}.mp4",
        uri="",
        version=1,
        identity="",
        times=np.arange(num_frames) / rate,
        rows=np.arange(num_frames),
        cuts=flags,
        width=64,
        height=48,
        missing=0,
        digest=name,
    )


def make_plan(*videos: StoredVideo, seed: int = 0, slots: int = 4, clips_per_slot: int = 3) -> Plan:
    return Plan(
        videos=videos,
        num_frames=2,
        stride_seconds=0.5,
        avoid_cuts=True,
        seed=seed,
        slots=slots,
        clips_per_slot=clips_per_slot,
        clip_size=32,
        clip_scale=(0.2, 1.0),
        aspect_ratio=(0.75, 4 / 3),
        settings={"clip.num_frames": 2},
    )


def slow_clip_table(times, cuts, num_frames, stride, *, avoid_cuts):
    """Compute `clip_table` from its definition, clip by clip and frame by frame."""
    tolerance = 0.75 * np.median(np.diff(times))
    table = []
    for start in range(len(times)):
        frames = []
        for i in range(num_frames):
            wanted = times[start] + i * stride
            nearest = min(range(len(times)), key=lambda f: (abs(times[f] - wanted), f))
            frames.append(nearest if abs(times[nearest] - wanted) <= tolerance else None)
        if None in frames or len(set(frames)) < num_frames:
            continue
        if avoid_cuts and any(cuts[f] for f in range(frames[0] + 1, frames[-1] + 1)):
            continue
        table.append(frames)
    return table


@given(
    gaps=st.lists(st.sampled_from([0.1, 0.15, 0.2, 1.7]), min_size=2, max_size=30),
    cuts=st.lists(st.booleans(), min_size=31, max_size=31),
    num_frames=st.integers(2, 4),
    stride=st.sampled_from([0.2, 0.35, 0.5]),
    avoid_cuts=st.booleans(),
)
def test_clip_table_is_its_definition(gaps, cuts, num_frames, stride, avoid_cuts) -> None:
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    flags = np.array(cuts[: len(times)])
    fast = clip_table(times, flags, num_frames, stride, avoid_cuts=avoid_cuts).tolist()
    slow = slow_clip_table(times, flags, num_frames, stride, avoid_cuts=avoid_cuts) if len(times) >= num_frames else []
    assert fast == slow


@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=4),
    seed=st.integers(0, 5),
    slots=st.integers(1, 5),
    clips_per_slot=st.integers(1, 7),
)
def test_every_clip_once_an_epoch(lengths, seed, slots, clips_per_slot) -> None:
    videos = [stored(length, name=str(i)) for i, length in enumerate(lengths)]
    plan = make_plan(*videos, seed=seed, slots=slots, clips_per_slot=clips_per_slot)
    size = plan.clips_per_epoch
    assert size == sum(length - 3 for length in lengths)
    steps = -(-2 * size // (slots * clips_per_slot))
    clips = [clip for step in range(steps) for slot in range(slots) for clip in plan.slot_clips(step, slot)]
    assert [clip.number for clip in clips] == list(range(len(clips)))
    for epoch in range(2):
        drawn = [(clip.video, clip.frames) for clip in clips[epoch * size : (epoch + 1) * size]]
        assert len(set(drawn)) == size


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    plan = make_plan(stored(60))
    size = plan.clips_per_epoch
    orders = [[plan.clip(n).frames for n in range(e * size, (e + 1) * size)] for e in (0, 1)]
    other = [make_plan(stored(60), seed=1).clip(n).frames for n in range(size)]
    assert len({tuple(orders[0]), tuple(orders[1]), tuple(other)}) == 3


@given(world_size=st.integers(1, 9), num_slots=st.integers(1, 9), begin=st.integers(0, 5), steps=st.integers(1, 9))
def test_ranks_share_the_slots_in_turns(world_size, num_slots, begin, steps) -> None:
    """No rank gets ahead of another, even where the world size does not divide the number of slots."""
    totals = [0] * world_size
    for step in range(begin, begin + steps):
        shares = [slots_of_rank(rank, world_size, num_slots, step=step, begin=begin) for rank in range(world_size)]
        assert sorted(slot for share in shares for slot in share) == list(range(num_slots))
        totals = [total + len(share) for total, share in zip(totals, shares, strict=True)]
        assert max(totals) - min(totals) <= 1


@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=4), window=st.integers(0, 5), segment=st.integers(3, 15)
)
def test_windows_are_the_epoch_in_parts(lengths, window, segment) -> None:
    """Each window holds whole segments, each start occurs once per epoch, and `place` finds it by number."""
    videos = [replace_edges(stored(length, name=str(i)), segment) for i, length in enumerate(lengths)]
    plan = replace(make_plan(*videos), window_segments=window)
    for epoch in range(2):
        windows = plan.windows(epoch)
        assert sorted(row for part in windows for row in part.rows.tolist()) == list(range(plan.clips_per_epoch))
        assert sorted(unit for part in windows for unit in part.units.tolist()) == list(range(len(plan.units)))
        for part in windows:
            rows = [row for unit in part.units for row in range(*plan.units[unit, 1:])]
            assert sorted(rows) == sorted(part.rows.tolist())
            assert len(part.units) <= (window or len(plan.units))
            for place, row in enumerate(part.rows.tolist()):
                assert plan.place(part.first + place) == (part, place)
                assert plan.clip(part.first + place).frames == tuple(plan.starts[row, 1:])


class Cut:
    """Video that its ingest cuts into segments."""

    def __init__(self, video: StoredVideo, edges: np.ndarray) -> None:
        self._video, self.edges = video, edges

    def __getattr__(self, name: str):
        return getattr(self._video, name)


def replace_edges(video: StoredVideo, segment: int) -> Cut:
    return Cut(video, np.unique([*range(0, len(video), segment), len(video)]))


def test_no_clip_runs_through_a_cut() -> None:
    plan = make_plan(stored(30, cuts=(10,)))
    for start, end in plan.starts[:, 1:]:
        assert not start < 10 <= end
    assert replace(plan, avoid_cuts=False).clips_per_epoch > plan.clips_per_epoch


def test_boxes_lie_inside_the_stored_frame_and_repeat() -> None:
    plan = make_plan(stored(30))
    clips = plan.slot_clips(3, 2)
    boxes = plan.slot_boxes(3, 2, clips)
    for top, left, height, width in boxes:
        assert 0 <= top <= top + height <= 48
        assert 0 <= left <= left + width <= 64
    assert np.array_equal(boxes, plan.slot_boxes(3, 2, clips))


def test_random_numbers_differ_by_every_part_of_their_key() -> None:
    keys = [(0, 0, 0, Purpose.HEADS), (1, 0, 0, Purpose.HEADS), (0, 1, 0, Purpose.HEADS), (0, 0, 1, Purpose.HEADS)]
    keys.append((0, 0, 0, Purpose.NETWORK))
    assert len({slot_generator(*key).random() for key in keys}) == len(keys)
    assert len({slot_seed(*key) for key in keys}) == len(keys)


def test_random_numbers_are_these_forever() -> None:
    # NumPy guarantees that SeedSequence and PCG64 never change; NumPy 2.4.6 printed these when the plan was first
    # written.
    assert slot_seed(0, 1, 2, Purpose.NETWORK) == 4244340947422063925
    assert slot_generator(0, 1, 2, Purpose.CLIP_CROP).integers(0, 1000, 4).tolist() == [409, 560, 463, 865]


def test_digest_names_every_input() -> None:
    plan = make_plan(stored(30))
    assert plan.digest == make_plan(stored(30)).digest
    others = [
        make_plan(stored(31)),
        make_plan(stored(30, name="b")),
        make_plan(stored(30, cuts=(4,))),
        make_plan(stored(30), seed=1),
        make_plan(stored(30), stored(30, name="b")),
        make_plan(stored(30, name="b"), stored(30)),
        replace(plan, settings={"clip.num_frames": 3}),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == len(others) + 1


def test_too_short_says_what_to_do() -> None:
    with pytest.raises(VideoError, match=r"no clip fits: a\.mp4: lasts 0\.33 s.* needs 0\.5 s; lower one"):
        make_plan(stored(3)).check()
    with pytest.raises(VideoError, match=r"every span of 0\.5 s \(the length of a clip\) contains a shot cut"):
        make_plan(stored(4, cuts=(1, 2, 3))).check()


def test_no_clip_shows_a_frame_twice() -> None:
    """A film with one frame a second has no pairs half a second apart."""
    times = np.arange(20.0)
    assert len(clip_table(times, np.zeros(20, bool), 2, 0.5, avoid_cuts=False)) == 0
    assert len(clip_table(times, np.zeros(20, bool), 2, 1.0, avoid_cuts=False)) == 19


@pytest.mark.parametrize(
    ("times", "num_frames", "stride", "says"),
    [
        (np.arange(60.0), 2, 0.5, r"frames are 1 s apart, .* it must be at least 1$"),
        (np.arange(6) * 30.0, 8, 1.0, r"must be at least 30, and clip\.num_frames at most 6"),
        (
            np.arange(20) / 6,
            8,
            1.0,
            r"lasts 3\.17 s, and a clip of clip\.num_frames=8 .* needs 7 s; lower one of the two",
        ),
        (np.array([0, 0.1, 0.2, 9.0, 9.1, 9.2]), 2, 1.0, "many are missing"),
        (np.zeros(1), 2, 1.0, r"lasts 0\.00 s"),
    ],
)
def test_the_advice_is_the_one_that_helps(times, num_frames, stride, says):
    assert re.search(says, no_clip(times, num_frames, stride))


def test_the_advised_stride_gives_clips():
    times = np.arange(60.0)
    assert no_clip(times, 2, 1.0) == ""
    assert no_clip(times, 8, 1.0) == ""


def test_a_video_without_a_clip_is_named_among_others_and_refused_alone(caplog):
    refuse_without_clips({"/a.mp4": "why"}, num_videos=2)
    assert "/a.mp4 yields no clip: why" in caplog.text
    with pytest.raises(VideoError, match=r"no clip fits: /a\.mp4: why; the 1 other videos yield none either"):
        refuse_without_clips({"/a.mp4": "why", "/b.mp4": "why"}, num_videos=2)
