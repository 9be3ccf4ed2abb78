"""Missing frames are reported, and refused above a limit; frames stored by older decoding rules are recognized."""

from __future__ import annotations

import logging
from dataclasses import replace

import lance
import pytest

from dora_ray.errors import VideoError
from dora_ray.store import datasets
from dora_ray.store import frames as frame_store
from dora_ray.store.frames import open_videos
from dora_ray.store.indexes import load_index
from dora_ray.store.losses import losses, missing_share, stored_frames, whole_videos
from dora_ray.video.index import DECODING_RULES
from tests.store.reading import FORM
from tests.store.test_frames import fill, uri_of
from tests.video import odd_videos, videos


@pytest.fixture
def films(tmp_path):
    """Return a store with a film that lacks two of 14 kept frames, and a complete one."""
    store = str(tmp_path / "store")
    torn, whole = (load_index(str(make(tmp_path)), store=store) for make in (videos.h264, videos.h264_b_frames))
    lost = torn.pts[torn.kept_frames(FORM.frames_per_second)][[3, 7]].tolist()
    fill(torn, store, lost=lost)
    fill(whole, store)
    return store, open_videos([torn, whole], store=store, form=FORM)


def test_missing_frames_are_described_in_a_sentence(films):
    store, (torn, whole) = films
    assert losses([torn, whole]) == {
        torn.path: "2 of 14 frames (14.3%) are missing: they cannot be decoded, or damage may have reached them"
    }
    assert (missing_share(torn), missing_share(whole)) == (2 / 14, 0)
    assert stored_frames(store, whole.video_id) == ["f10-s64-q90: 14 frames"]
    assert stored_frames(store, torn.video_id)[0].startswith("f10-s64-q90: 12 frames; 2 of 14 frames (14.3%) are")


def test_more_than_is_allowed_is_an_error_that_names_every_such_video(films, caplog):
    _, (torn, whole) = films
    with caplog.at_level(logging.WARNING):
        whole_videos([torn, whole], max_bad_fraction=0.2)
    assert f"{torn.path}: 2 of 14 frames" in caplog.text
    assert whole.path not in caplog.text
    other = replace(torn, path="other.mp4")
    with pytest.raises(VideoError, match=r"h264\.mp4: 2 of 14 .*; other\.mp4: 2 of 14 .*max_bad_fraction=0\.1 allows"):
        whole_videos([torn, whole, other], max_bad_fraction=0.1)
    assert whole_videos([whole], max_bad_fraction=0.0) == [whole]
    assert whole_videos([torn, whole], max_bad_fraction=0.1, skip_unreadable=True) == [whole]
    with pytest.raises(VideoError):
        whole_videos([torn], max_bad_fraction=0.1, skip_unreadable=True)


def test_an_end_that_a_file_has_lost_is_told_and_not_refused(tmp_path):
    store = str(tmp_path / "store")
    index = load_index(str(videos.truncated(tmp_path, ".mkv", seconds=8.0)), store=store)
    fill(index, store, order=range(len(index.segments(0.2))))
    stored = open_videos([index], store=store, form=FORM)
    lost = index.declared_seconds - index.real_seconds
    assert losses(stored)[index.path].startswith(f"the file has lost its end: {lost:.1f} of 8.0 s (")
    assert whole_videos(stored, max_bad_fraction=0.0) == stored


def by_older_rules(uri: str) -> None:
    """Rebuild the dataset as it was before its metadata named the decoding rules."""
    lance.write_dataset(datasets.SCHEMA.empty_table(), uri, mode="create")


def test_frames_stored_by_harmful_older_rules_are_refused(tmp_path):
    store = str(tmp_path / "store")
    index = load_index(str(odd_videos.marked_mpeg4(tmp_path)), store=store)
    assert index.rules == DECODING_RULES == 2
    uri = uri_of(index, store)
    by_older_rules(uri)
    fill(index, store)
    words = r"decoding rules \(?1.*now 2\).*remove this folder.*ingest again"
    with pytest.raises(VideoError, match=words):
        open_videos([index], store=store, form=FORM)
    with pytest.raises(VideoError, match=words):
        frame_store.unstored_frames(index, uri, FORM)


def test_frames_stored_by_harmless_older_rules_are_read_with_a_warning(tmp_path, caplog):
    store = str(tmp_path / "store")
    index = load_index(str(videos.h264(tmp_path)), store=store)
    by_older_rules(uri_of(index, store))
    fill(index, store)
    with caplog.at_level(logging.WARNING):
        (video,) = open_videos([index], store=store, form=FORM)
    assert len(video) == 14
    assert "older decoding rules (1; now 2), which treat files such as this one the same way" in caplog.text


def test_a_store_made_now_says_nothing(films, caplog):
    store, (torn, _) = films
    open_videos([torn.path], store=store, form=FORM)
    assert "rules" not in caplog.text
