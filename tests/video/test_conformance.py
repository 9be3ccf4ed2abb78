"""Conformance: every kind of file gives the frames and times of a full decode from its start."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av
import numpy as np
import pytest

from dora_ray.errors import VideoError
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.sources import open_container, video_stream
from dora_ray.video.synthetic import read_counter
from tests.video import conformance, odd_videos
from tests.video.conformance import KINDS

IDS = [kind.words.replace(" ", "_") for kind in KINDS]
READ = [kind for kind in KINDS if not kind.refused]
READ_IDS = [kind.words.replace(" ", "_") for kind in READ]


def by_segments(name: str, index: VideoIndex, *, every: int = 1) -> dict[int, int]:
    """Return {pts: painted number}, decoded as by the ingest, each frame once."""
    found: dict[int, int] = {}
    edges = [part.start_pts for part in index.segments(0.2)][1:]
    for wanted in np.split(index.pts, np.searchsorted(index.pts, edges)):
        for frame in get_decoder(name).decode(index, wanted[::every], short_side=64):
            assert frame.pts not in found
            found[frame.pts] = read_counter(frame.y)
    return found


@pytest.mark.parametrize("kind", READ, ids=READ_IDS)
def test_frames_and_times_equal_a_full_decode(kind, tmp_path):
    index = index_video(str(kind.make(tmp_path)))
    found = by_segments("pyav", index)
    shown = sorted(found)
    assert [found[pts] for pts in shown] == list(kind.numbers)
    assert index.seconds(np.array(shown)) == pytest.approx(kind.times, abs=2e-3)
    assert kind.warning in " ".join(index.warnings)
    assert bool(kind.warning) == bool(index.warnings)
    for every in (3, 10):
        sparse = by_segments("pyav", index, every=every)
        assert sparse == {pts: found[pts] for pts in sparse}
        assert len(sparse) >= len(shown) // every


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.refused], ids=lambda kind: kind.words)
def test_unreadable_kinds_are_refused_in_one_sentence(kind, tmp_path):
    path = kind.make(tmp_path)
    with pytest.raises(VideoError, match=kind.refused) as caught:
        index_video(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", READ, ids=READ_IDS)
def test_a_decode_from_the_start_shows_the_same_pictures(kind, tmp_path):
    """PyAV's plain loop gives the table's numbers."""
    index = index_video(str(kind.make(tmp_path)))
    with open_container(index.path) as container:
        stream = video_stream(container, index.path)
        stream.codec_context.skip_frame = "DEFAULT"
        frames = []
        for packet in container.demux(stream):
            try:
                frames += packet.decode()
            except av.FFmpegError:
                assert kind.make is odd_videos.headless
    turned = index.rotation or index.mirrored
    numbers = [] if turned else [read_counter(frame.to_ndarray(format="gray")) for frame in frames]
    if not turned:
        assert numbers == list(kind.numbers)


@pytest.mark.skipif(not importlib.util.find_spec("decord"), reason="decord has no wheel here")
@pytest.mark.parametrize("kind", READ, ids=READ_IDS)
def test_decord_is_exact_or_refused(kind, tmp_path):
    index = index_video(str(kind.make(tmp_path)))
    if kind.decord == conformance.EXACT:
        assert list(by_segments("decord", index).values()) == list(kind.numbers)
        return
    with pytest.raises(VideoError, match=rf"{kind.decord}.*; use data\.decoder=pyav"):
        by_segments("decord", index)


def test_the_table_in_the_docs_is_up_to_date():
    text = Path(__file__).parents[2].joinpath("docs", "data.md").read_text(encoding="utf-8")
    assert "\n".join(conformance.table()) in text


@pytest.mark.parametrize("name", sorted(odd_videos.ORIENTATIONS))
def test_all_eight_orientations_are_shown_as_ffmpeg_shows_them(name, tmp_path):
    path = odd_videos.oriented(tmp_path, name)
    index = index_video(str(path))
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="gray")
    shown = odd_videos.ORIENTATIONS[name][1](stored)
    assert (index.height, index.width) == shown.shape
    frame = next(iter(get_decoder("pyav").decode(index, index.pts[:1], short_side=512)))
    difference = np.abs(frame.y.astype(float) - shown)
    assert difference.mean() < 2
