"""The plan of direct streaming: every clip of every dealt segment, in an order that is a pure function of the step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_ray.clips.segments import SegmentPlan, StreamedVideo, streamed_videos
from dora_ray.config import load_config
from dora_ray.errors import ConfigError, VideoError
from dora_ray.training.launch import make_plan
from dora_ray.video.index import Segment, VideoIndex, index_video
from tests.conftest import BIKES, SMALL
from tests.video import videos

RATE = 6


def streamed(num_frames: int, group: int, name: str) -> StreamedVideo:
    """A video of RATE kept frames a second, whose ticks are kept frames, with a key frame every `group` of them."""
    pts = np.arange(num_frames)
    keys = np.arange(0, num_frames, group)
    index = SimpleNamespace(
        pts=pts,
        key_pts=keys,
        packet_pts=(),
        tick=1 / RATE,
        time_base=(1, RATE),
        video_id=name,
        path=f"{name}.mp4",
        digest=name,
    )
    index.segments = lambda seconds: VideoIndex.segments(index, seconds)
    return StreamedVideo(index, pts, pts / RATE, 64, 48)


def segment_plan(*found: StreamedVideo, **changes) -> SegmentPlan:
    options = {
        "num_frames": 2,
        "stride_seconds": 0.5,
        "avoid_cuts": False,
        "seed": 0,
        "slots": 3,
        "clips_per_slot": 4,
        "clip_size": 32,
        "clip_scale": (0.2, 1.0),
        "aspect_ratio": (0.75, 4 / 3),
        "segment_seconds": 2.0,
        "shuffle_segments": 2,
        "crops_per_clip": 1,
        "decoder": "pyav",
        "short_side": 48,
        "jpeg_quality": 85,
    }
    return SegmentPlan(videos=found, **(options | changes))


plans = st.builds(
    lambda lengths, group, **changes: segment_plan(
        *(streamed(length, group, str(n)) for n, length in enumerate(lengths)), **changes
    ),
    lengths=st.lists(st.integers(4, 60), min_size=1, max_size=3),
    group=st.integers(1, 20),
    seed=st.integers(0, 3),
    slots=st.integers(1, 5),
    clips_per_slot=st.integers(1, 9),
    shuffle_segments=st.integers(1, 4),
    crops_per_clip=st.integers(1, 3),
    segment_seconds=st.sampled_from([0.5, 2.0, 100.0]),
)


def slow_segment_of(plan: SegmentPlan, video: int, first: int) -> tuple[int, int]:
    """(video, number) of the segment that a clip starts in, by the definition."""
    for segment in plan.videos[video].index.segments(plan.segment_seconds):
        if segment.start_pts <= first < segment.stop_pts:
            return video, segment.number
    raise AssertionError("outside of all segments")


def slow_slot(plan: SegmentPlan, slot: int, num_clips: int) -> list[tuple[int, ...]]:
    """The first clips of a slot's endless stream: dealt, pooled, permuted and emitted one by one."""
    emitted: list[tuple[int, ...]] = []
    line, count, epoch, group = [], len(plan.segments), 0, 0
    while len(emitted) < num_clips:
        while len(line) <= slot + plan.slots * ((group + 1) * plan.shuffle_segments):
            seed = np.random.SeedSequence((plan.seed, epoch, 0, 8))
            line += np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
            epoch += 1
        mine = line[slot :: plan.slots][group * plan.shuffle_segments : (group + 1) * plan.shuffle_segments]
        pool = [row for segment in mine for row in range(*plan.segments[segment, 1:])]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((plan.seed, group, slot, 9))))
        for _ in range(plan.crops_per_clip):
            emitted += [tuple(plan.starts[pool[place]].tolist()) for place in rng.permutation(len(pool))]
        group += 1
    return emitted[:num_clips]


@given(plan=plans)
@settings(deadline=None)
def test_segments_hold_every_clip_once(plan) -> None:
    rows = [row for _, first, last in plan.segments for row in range(first, last)]
    assert rows == list(range(len(plan.starts)))
    for number, (video, first, last) in enumerate(plan.segments.tolist()):
        assert len({slow_segment_of(plan, v, f) for v, f, *_ in plan.starts[first:last].tolist()}) == 1
        held, frames = plan.segment_frames(number)
        assert held is plan.videos[video]
        assert frames.tolist() == sorted({f for row in plan.starts[first:last] for f in row[1:].tolist()})


@given(plan=plans, data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_step_is_its_place_in_the_slots_stream(plan, data) -> None:
    """Asked first and asked last, a step gives the same: a resume needs no history."""
    slot, step = data.draw(st.integers(0, plan.slots - 1)), data.draw(st.integers(0, 12))
    size = plan.clips_per_slot
    clips = plan.slot_clips(step, slot)
    expected = slow_slot(plan, slot, (step + 1) * size)[step * size :]
    assert [(clip.video, *clip.frames) for clip in clips] == expected
    assert [clip.number for clip in clips] == [(step * plan.slots + slot) * size + i for i in range(size)]
    assert plan.clip(clips[-1].number) == clips[-1]
    for clip in clips:
        _, frames = plan.segment_frames(clip.segment)
        assert set(clip.frames) <= set(frames.tolist())
    again = replace(plan)
    for other in range(step, step + 3):
        again.slot_clips(other, slot)
    assert again.slot_clips(step, slot) == clips


@given(plan=plans)
@settings(max_examples=50, deadline=None)
def test_every_clip_once_for_every_time_its_segment_is_dealt(plan) -> None:
    """Over whole pools: a slot emits what it was dealt, `crops_per_clip` times, and nothing else."""
    for slot in range(plan.slots):
        dealt = [plan.group_segments(slot, group) for group in range(3)]
        sizes = (plan.segments[:, 2] - plan.segments[:, 1]).tolist()
        total = plan.crops_per_clip * sum(sizes[segment] for group in dealt for segment in group)
        steps = -(-total // plan.clips_per_slot)
        clips = [clip for step in range(steps) for clip in plan.slot_clips(step, slot)][:total]
        times_dealt = Counter(segment for group in dealt for segment in group)
        emitted = Counter((clip.video, *clip.frames) for clip in clips)
        for segment, (_, first, last) in enumerate(plan.segments.tolist()):
            for row in plan.starts[first:last].tolist():
                assert emitted[tuple(row)] == plan.crops_per_clip * times_dealt[segment]


@given(plan=plans)
@settings(deadline=None)
def test_an_epoch_deals_every_segment_once(plan) -> None:
    count, rounds = len(plan.segments), 3 * len(plan.segments)
    line = {}
    for slot in range(plan.slots):
        mine = [segment for group in range(rounds) for segment in plan.group_segments(slot, group)]
        line |= {slot + plan.slots * place: segment for place, segment in enumerate(mine)}
    for epoch in range(3):
        assert sorted(line[epoch * count + place] for place in range(count)) == list(range(count))


def test_live_segments_are_those_of_the_pool_and_the_next() -> None:
    plan = segment_plan(streamed(400, 12, "a"))
    for step in range(30):
        now, following = plan.live_segments(step, 1)
        assert {clip.segment for clip in plan.slot_clips(step, 1)} <= set(now)
        later = {clip.segment for clip in plan.slot_clips(step + 1, 1)}
        assert later <= {*now, *following}


def test_crops_of_a_clip_differ_and_are_apart() -> None:
    plan = segment_plan(streamed(120, 12, "a"), crops_per_clip=2, slots=1, clips_per_slot=1)
    pool = sum((plan.segments[s, 2] - plan.segments[s, 1]) for s in plan.group_segments(0, 0))
    clips = [plan.slot_clips(step, 0)[0] for step in range(2 * pool)]
    places = {}
    for step, clip in enumerate(clips):
        places.setdefault((clip.video, clip.frames), []).append(step)
    assert all(len(steps) == 2 for steps in places.values())
    boxes = [[plan.slot_boxes(step, 0, [clips[step]])[0].tolist() for step in steps] for steps in places.values()]
    assert all(one != other for one, other in boxes)
    assert np.median([late - early for early, late in places.values()]) > pool / 4


def test_segments_cut_the_file_at_key_frames(tmp_path) -> None:
    index = index_video(str(videos.h264_open_groups(tmp_path)))
    (video,) = streamed_videos([index, index], decoder="pyav", frames_per_second=10, short_side=48)
    assert (video.width, video.height) == (80, 48)
    assert index.segments(0.1)[1] == Segment(1, int(index.key_pts[1]), int(index.key_pts[2]))
    plan = segment_plan(video, segment_seconds=0.1, stride_seconds=0.2)
    assert len(plan.segments) > 1
    first = [int(video.pts[plan.starts[begin, 1]]) for _, begin, _ in plan.segments.tolist()]
    assert all(index.key_before(pts) <= pts for pts in first)


def test_refused_decoder_is_named(tmp_path) -> None:
    index = index_video(str(videos.h264_open_groups(tmp_path)))
    with pytest.raises(VideoError, match="decord is refused"):
        streamed_videos([index], decoder="decord", frames_per_second=10, short_side=48)


def test_plan_of_a_configuration_names_its_source() -> None:
    from dora_ray.video.index import find_videos

    direct = load_config("tiny", *SMALL, f"data.videos=[{BIKES}]", "data.source=video", "clip.avoid_cuts=false")
    index = index_video(*find_videos([BIKES]))
    found = streamed_videos([index], decoder="pyav", frames_per_second=6, short_side=48)
    plan = make_plan(direct, found)
    assert isinstance(plan, SegmentPlan)
    assert plan.fingerprint["data.source"] == "video"
    settings_ = ("stream_segment_seconds=5", "shuffle_segments=2", "crops_per_clip=2")
    others = [make_plan(load_config(direct, f"data.{change}"), found).digest for change in settings_]
    assert len({plan.digest, *others}) == 4


def test_what_direct_streaming_cannot_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"avoid_cuts=true with data\.source=video.*clip\.avoid_cuts=false"):
        load_config("tiny", "data.source=video", "clip.avoid_cuts=true")
    with pytest.raises(ConfigError, match=r"crops_per_clip=3 with data\.source=store"):
        load_config("tiny", "data.crops_per_clip=3")
