"""Direct streaming: the same pixels as the frame store's, in threads and on Ray, and what is unreadable is marked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dora_ray.clips.direct import decode_segment
from dora_ray.clips.pipeline import slots_in_order
from dora_ray.clips.segments import SegmentPlan, StreamedVideo, streamed_videos
from dora_ray.clips.slot import SlotBatch, read_slot
from dora_ray.clips.stream import local_slots, ray_slots
from dora_ray.config import load_config
from dora_ray.errors import VideoError
from dora_ray.store.frames import StoredVideo, read_frames
from dora_ray.store.supervision import Unwatched
from dora_ray.training.launch import ingest_videos, make_plan
from dora_ray.video.index import index_video
from dora_ray.video.synthetic import make_video
from tests.conftest import SMALL
from tests.video import videos

DIRECT = (
    *SMALL,
    "data.source=video",
    "clip.avoid_cuts=false",
    "data.stream_segment_seconds=1",
    "clip.stride_seconds=0.5",
)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 seconds with a key frame every second."""
    path = tmp_path_factory.mktemp("film") / "walk.mp4"
    return make_video(path, width=160, height=96, num_frames=480, frames_per_second=24, seed=1, group_size=24)


def plan_of(path: Path, *overrides: str) -> SegmentPlan:
    config = load_config("tiny", *DIRECT, f"data.videos=[{path}]", *overrides)
    found = streamed_videos([index_video(str(path))], decoder="pyav", frames_per_second=6, short_side=48)
    plan = make_plan(config, found)
    assert isinstance(plan, SegmentPlan)
    return plan


@pytest.fixture(scope="module")
def plan(film: Path) -> SegmentPlan:
    return plan_of(film)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> SegmentPlan:
    """A file with two packets zeroed in its second group of pictures: its frames from there on are lost."""
    path = videos.damaged(tmp_path_factory.mktemp("damaged"))
    return plan_of(path, "data.stream_segment_seconds=0.4", "clip.stride_seconds=0.2", "data.shuffle_segments=2")


def bare(plan: SegmentPlan, step: int, slot: int) -> SlotBatch:
    """A slot without any pipeline."""
    numbers = {clip.segment for clip in plan.slot_clips(step, slot)}
    return read_slot(plan, step, slot, {number: decode_segment(plan, number) for number in numbers})


def through_threads(plan: SegmentPlan, keys: list[tuple[int, int]], **changes) -> Iterator[SlotBatch]:
    options = {"prefetch": 3, "num_threads": 2, "decode_seconds": 60.0}
    return local_slots(plan, iter(keys), **(options | changes))


def through_ray(plan: SegmentPlan, steps: range, slots: list[int], **changes) -> Iterator[SlotBatch]:
    options = {"prefetch": 2, "slots_per_task": 1, "cpus_per_task": 0.5, "num_streams": 1, "node_label": None}
    return ray_slots(plan, steps, slots, **(options | {"decode_seconds": 60.0} | changes))


def same(one: SlotBatch, other: SlotBatch) -> bool:
    equal = np.array_equal(one.clips, other.clips) and np.array_equal(one.valid, other.valid)
    return equal and (one.step, one.slot, one.digest) == (other.step, other.slot, other.digest)


@pytest.mark.ray
def test_frames_are_the_stores(plan: SegmentPlan, film: Path, tmp_path: Path, ray_cluster) -> None:
    config = load_config("tiny", *SMALL, f"data.videos=[{film}]")
    (stored,) = ingest_videos(config, str(tmp_path / "store"))
    assert isinstance(stored, StoredVideo)
    assert np.array_equal(stored.times, plan.videos[0].times)
    for segment in (0, len(plan.segments) - 1):
        frames = plan.segment_frames(segment)[1].tolist()
        direct = decode_segment(plan, segment).read(frames)
        assert all(np.array_equal(one, other) for one, other in zip(direct, read_frames(stored, frames), strict=True))


def test_threads_give_what_the_plan_says_from_any_step(plan: SegmentPlan) -> None:
    keys = [(step, slot) for step in range(12) for slot in (0, 1, 2, 3)]
    batches = list(through_threads(plan, keys))
    assert [(batch.step, batch.slot) for batch in batches] == keys
    assert all(batch.valid.all() for batch in batches)
    for batch in batches[::7]:
        assert same(batch, bare(plan, batch.step, batch.slot))
    late = [key for key in keys if key[0] >= 9]
    assert all(same(one, other) for one, other in zip(through_threads(plan, late), batches[-len(late) :], strict=True))


def test_no_thread_decodes_on_after_the_last_slot(plan: SegmentPlan) -> None:
    """In the middle of a segment of many frames for the next pool, of which the process would die at its exit."""
    before = set(threading.enumerate())
    stream = through_threads(replace(plan, segment_seconds=5.0, short_side=96), [(step, 0) for step in range(99)])
    next(stream)
    assert [thread.name for thread in threading.enumerate() if thread not in before].count("segments") == 2
    stream.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("slots_per_task", [1, 3])
def test_ray_gives_what_threads_give(plan: SegmentPlan, slots_per_task: int) -> None:
    keys = [(step, slot) for step in range(3, 12) for slot in (1, 3)]
    local = list(through_threads(plan, keys))
    remote = list(through_ray(plan, range(3, 12), [1, 3], slots_per_task=slots_per_task))
    assert all(same(one, other) for one, other in zip(remote, local, strict=True))


class CountingEngine:
    """An engine that does nothing and counts."""

    def __init__(self) -> None:
        self.decoded: list[int] = []
        self.decoded_by: dict[int, set[int]] = {}

    def decode(self, segment: int, *, again: bool = False) -> int:
        self.decoded.append(segment)
        return segment

    def read(self, keys, segments, *, again: bool = False):
        self.decoded_by |= {step: set(self.decoded) for step, _ in keys}
        return keys

    def result(self, handle) -> list[SlotBatch]:
        empty = np.zeros((1,), np.uint8)
        return [SlotBatch(*key, empty, empty.astype(bool), 0, True) for key in handle]

    def unfinished(self, handles: list) -> list:
        return []

    def capacity(self) -> int:
        return 4

    def close(self) -> None:
        pass


@pytest.mark.parametrize("begin", [0, 31])
def test_each_segment_is_decoded_once_an_epoch_and_a_resume_decodes_the_pools_at_hand(
    plan: SegmentPlan, begin: int
) -> None:
    alone = replace(plan, slots=1, shuffle_segments=3)
    engine = CountingEngine()
    last = begin + alone.clips_per_epoch // alone.clips_per_slot
    keys = iter([(step, 0) for step in range(begin, last)])
    stream = slots_in_order(alone, keys, engine, slots_per_task=1, prefetch=1)
    next(stream)
    ahead = {segment for step in range(begin, begin + 9) for part in alone.live_segments(step, 0) for segment in part}
    assert set(engine.decoded) <= ahead
    list(stream)
    assert len(alone.segments) - 3 <= len(engine.decoded) <= len(alone.segments) + 3 * 3


def test_the_next_pool_is_decoded_before_a_step_needs_it(plan: SegmentPlan) -> None:
    alone = replace(plan, slots=1, shuffle_segments=3)
    engine, steps = CountingEngine(), range(40)
    list(slots_in_order(alone, iter([(step, 0) for step in steps]), engine, slots_per_task=1, prefetch=1))
    needed = {step: set(alone.live_segments(step, 0)[0]) for step in steps}
    begins = [step for step in steps[1:] if not needed[step] <= needed[step - 1]]
    assert len(begins) > 2
    assert all(needed[step] <= engine.decoded_by[step - 1] for step in begins)


class OneBlindNode(CountingEngine):
    """Its first decoding of segment 0 happens on a node that does not see the file."""

    def __init__(self, plan: SegmentPlan) -> None:
        super().__init__()
        self._plan = plan

    def decode(self, segment: int, *, again: bool = False) -> tuple[int, bool]:
        super().decode(segment)
        return segment, segment != 0 or again

    def read(self, keys, segments, *, again: bool = False):
        return keys, {segment for segment, seen in segments.values() if not seen}

    def result(self, handle) -> list[SlotBatch]:
        keys, unseen = handle
        batches = []
        for key in keys:
            valid = np.array([clip.segment not in unseen for clip in self._plan.slot_clips(*key)])
            batches.append(SlotBatch(*key, np.zeros((len(valid),), np.uint8), valid, 0, bool(valid.all())))
        return batches


def test_all_slots_in_flight_get_what_was_decoded_again(plan: SegmentPlan) -> None:
    alone = replace(plan, slots=1, shuffle_segments=3)
    engine = OneBlindNode(alone)
    keys = [(step, 0) for step in range(alone.clips_per_epoch // alone.clips_per_slot)]
    batches = list(slots_in_order(alone, iter(keys), engine, slots_per_task=1, prefetch=6))
    assert all(batch.valid.all() for batch in batches)
    assert sum(any(clip.segment == 0 for clip in alone.slot_clips(*key)) for key in keys) > 1
    assert engine.decoded.count(0) <= 3, "once, again, and perhaps for the next epoch"


def test_damage_leaves_marked_clips_and_only_those(damaged: SegmentPlan) -> None:
    video = damaged.videos[0]
    assert isinstance(video, StreamedVideo)
    good = {
        int(frame)
        for segment in range(len(damaged.segments))
        for frame in decode_segment(damaged, segment).frames.tolist()
    }
    keys = [(step, slot) for step in range(3) for slot in range(4)]
    for batch in through_threads(damaged, keys):
        clips = damaged.slot_clips(batch.step, batch.slot)
        assert batch.valid.tolist() == [set(clip.frames) <= good for clip in clips]
        assert not batch.clips[~batch.valid].any()
        assert all(pixels.any() for pixels in batch.clips[batch.valid])
    assert 0 < len(good) < len(video.pts)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_damage_is_the_same_on_ray(damaged: SegmentPlan) -> None:
    keys = [(step, slot) for step in range(3) for slot in range(2)]
    local = list(through_threads(damaged, keys))
    assert not all(batch.valid.all() for batch in local)
    assert all(same(one, other) for one, other in zip(through_ray(damaged, range(3), [0, 1]), local, strict=True))


def test_missing_file_marks_its_clips(plan: SegmentPlan, tmp_path: Path) -> None:
    (video,) = plan.videos
    lost = replace(plan, videos=(replace(video, index=replace(video.index, path=str(tmp_path / "gone.mp4"))),))
    (batch,) = through_threads(lost, [(0, 0)])
    assert not batch.valid.any()


def test_a_file_that_changed_since_it_was_indexed_is_not_decoded(tmp_path: Path, caplog) -> None:
    """Other pictures at the same times and key frames."""
    film = {"width": 160, "height": 96, "num_frames": 96, "frames_per_second": 24, "group_size": 24}
    plan = plan_of(make_video(tmp_path / "walk.mp4", seed=1, **film))
    make_video(tmp_path / "walk.mp4", seed=2, **film)
    assert len(decode_segment(plan, 0).frames) == 0
    assert "when it was indexed: the file changed" in caplog.text


class Noting(Unwatched):
    """Writes down what is begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []

    def begin(self, item: int) -> None:
        self.begun.append(item)


def test_the_frame_begun_is_the_one_after_the_last_decoded(damaged: SegmentPlan) -> None:
    """Also behind a hole, or a hang there would cost another group of pictures than its own."""
    watch = Noting()
    whole = replace(damaged, segment_seconds=60.0)
    frames, good = whole.segment_frames(0)[1].tolist(), decode_segment(whole, 0, watch).frames.tolist()
    assert good[-1] == frames[-1]
    assert len(good) < len(frames)
    following = [frames[frames.index(frame) + 1] for frame in good[:-1]]
    assert watch.begun == [frames[0], *following]


def test_given_up_frames_cost_their_group_of_pictures(plan: SegmentPlan) -> None:
    frames = plan.segment_frames(0)[1].tolist()
    part = decode_segment(plan, 0, Unwatched(frozenset([frames[1]])))
    lost = sorted(set(frames) - set(part.frames.tolist()))
    assert lost == frames[:6]  # a second, the group that the frame is in
    whole = decode_segment(plan, 0)
    kept = part.frames.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(part.read(kept), whole.read(kept), strict=True))
    with pytest.raises(VideoError, match=r"1 of 2 frames could not be decoded"):
        part.read([lost[0], kept[0]])


def test_clips_of_given_up_frames_are_not_read_again(plan: SegmentPlan) -> None:
    """That decoding hangs was found out in more than one process; other clips of the segment are read."""
    clip = plan.slot_clips(0, 0)[0]
    assert clip.segment is not None
    numbers = {other.segment for other in plan.slot_clips(0, 0)}
    decoded = {number: decode_segment(plan, number, Unwatched(frozenset(clip.frames[:1]))) for number in numbers}
    batch = read_slot(plan, 0, 0, decoded)
    lost = set(decoded[clip.segment].given_up.tolist())
    assert batch.valid.tolist() == [lost.isdisjoint(other.frames) for other in plan.slot_clips(0, 0)]
    assert not batch.valid[0]
    assert batch.final
