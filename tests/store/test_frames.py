"""Frame store, filled without Ray."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lance
import numpy as np
import pytest

from dora_ray.errors import VideoError
from dora_ray.store import datasets, indexes
from dora_ray.store import frames as frame_store
from dora_ray.store.cache import local_copy
from dora_ray.store.frames import open_videos, read_jpegs
from dora_ray.store.indexes import load_index, stored_index
from dora_ray.video.decoders import get_decoder
from dora_ray.video.synthetic import make_video, read_counter
from tests.store.reading import FORM, read_frames
from tests.video import videos


def uri_of(index, store):
    return frame_store.dataset_uri(store, index.video_id, FORM)


def fill(index, store, *, skip=(), order=(0, 1, 2, 3), lost=()):
    """Store the kept frames of a video: one commit per segment, in the order given."""
    uri = uri_of(index, store)
    datasets.create_dataset(uri)
    kept = FORM.kept(index)
    segments = index.segments(0.2)
    for number in order:
        part = segments[number]
        wanted = [int(p) for p in kept[(kept >= part.start_pts) & (kept < part.stop_pts)] if p not in skip]
        rows = [
            datasets.missing_row(frame.pts, segment=number, width=frame.width, height=frame.height)
            if frame.pts in lost
            else datasets.frame_row(frame, segment=number, jpeg_quality=90)
            for frame in get_decoder("pyav").decode(index, wanted, short_side=64)
        ]
        datasets.commit(uri, datasets.write_rows(uri, rows))
    return uri


@pytest.fixture
def film(tmp_path):
    """Return a store's folder and the index of a video with 40 frames at 30 a second in four groups of pictures."""
    path = videos.h264(tmp_path)
    store = str(tmp_path / "store")
    return store, load_index(str(path), store=store)


def test_frames_come_back_by_number_whatever_the_order_of_commits(film):
    store, index = film
    fill(index, store, order=(2, 0, 3, 1))
    (video,) = open_videos([index.path], store=store, form=FORM)
    assert len(video) == 14
    assert video.times == pytest.approx(np.arange(14) / 10)
    assert not np.array_equal(video.rows, np.arange(14))
    wanted = [13, 0, 5, 5, 7]
    frames = read_frames(video, wanted)
    assert [read_counter(frame) for frame in frames] == [3 * n for n in wanted]
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((64, 106, 3), "uint8")}
    assert (video.height, video.width) == (64, 106)
    assert all(jpeg[:2] == b"\xff\xd8" for jpeg in read_jpegs(video, wanted))


def test_two_ingests_side_by_side_count_once(film):
    store, index = film
    fill(index, store)
    fill(index, store, order=(1, 3))
    (video,) = open_videos([index], store=store, form=FORM)
    assert len(video) == 14
    assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))


def test_a_picture_counts_before_a_row_that_gave_it_up(film):
    """One of two concurrent ingests gave up two segments, and committed first."""
    store, index = film
    fill(index, store, order=(1, 2), lost=set(index.pts.tolist()))
    fill(index, store)
    (video,) = open_videos([index], store=store, form=FORM)
    assert (video.missing, len(video)) == (0, 14)
    assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))


def test_a_pinned_version_is_unmoved_by_growth(film):
    store, index = film
    uri = fill(index, store)
    (video,) = open_videos([index], store=store, form=FORM)
    fill(index, store, order=(0,))
    assert lance.dataset(uri).version > video.version
    assert read_counter(read_frames(video, [4])[0]) == 12


def test_frames_that_cannot_be_decoded_leave_a_hole(film):
    store, index = film
    kept = index.pts[index.kept_frames(10.0)]
    fill(index, store, lost=set(kept[[0, 6]].tolist()))
    (video,) = open_videos([index], store=store, form=FORM)
    assert (video.missing, len(video)) == (2, 12)
    assert video.times == pytest.approx(np.delete(np.arange(14), [0, 6]) / 10)
    assert read_counter(read_frames(video, [5])[0]) == 21
    assert len(frame_store.unstored_frames(index, video.uri, FORM)) == 0


def test_a_video_without_a_readable_frame_is_an_error(film):
    store, index = film
    fill(index, store, lost=set(index.pts.tolist()))
    with pytest.raises(VideoError, match="none of its 14 frames could be decoded"):
        open_videos([index], store=store, form=FORM)


def test_missing_frames_are_counted(film):
    store, index = film
    with pytest.raises(VideoError, match="14 of 14 frames are missing from the store"):
        open_videos([index], store=store, form=FORM)
    kept = index.pts[index.kept_frames(10.0)]
    uri = fill(index, store, skip=set(kept[[2, 3]].tolist()))
    assert frame_store.unstored_frames(index, uri, FORM).tolist() == kept[[2, 3]].tolist()
    with pytest.raises(VideoError, match=r"2 of 14 frames .* dora-ray data ingest"):
        open_videos([index], store=store, form=FORM)


def test_settings_have_datasets_of_their_own(film):
    store, index = film
    fill(index, store)
    with pytest.raises(VideoError, match="at f10-s32-q90"):
        open_videos([index], store=store, form=replace(FORM, short_side=32))


def test_a_stored_video_travels_to_other_processes(film):
    store, index = film
    fill(index, store)
    (video,) = open_videos([index], store=store, form=FORM)
    again = pickle.loads(pickle.dumps(video))
    assert read_jpegs(again, [3]) == read_jpegs(video, [3])


def test_cuts_are_those_of_the_pictures(tmp_path):
    path = make_video(
        tmp_path / "v.mp4", width=160, height=96, num_frames=40, frames_per_second=30, seed=1, cuts=[20], group_size=10
    )
    store = str(tmp_path / "store")
    index = load_index(str(path), store=store)
    fill(index, store)
    (video,) = open_videos([index], store=store, form=FORM)
    assert np.flatnonzero(video.cuts).tolist() == [7]


def test_the_index_is_made_once(film, monkeypatch):
    store, index = film
    monkeypatch.setattr(indexes, "index_video", lambda path: pytest.fail("the file was indexed again"))
    again = load_index(index.path, store=store)
    assert again.digest == index.digest
    assert np.array_equal(again.pts, index.pts)


def test_a_touched_file_keeps_its_folder_and_a_changed_one_gets_another(film, tmp_path):
    store, index = film
    fill(index, store)
    os.utime(index.path, ns=(1, 1))
    touched = load_index(index.path, store=store)
    assert (touched.video_id, touched.mtime_ns) == (index.video_id, 1)
    assert len(open_videos([index.path], store=store, form=FORM)) == 1
    make_video(index.path, width=160, height=96, num_frames=50, frames_per_second=30, seed=9)
    assert load_index(index.path, store=store).video_id != index.video_id
    with pytest.raises(VideoError, match="missing from the store"):
        open_videos([index.path], store=store, form=FORM)


def test_a_damaged_index_in_the_store_is_made_again(film):
    store, index = film
    with open(f"{store}/{index.video_id}/index.npz", "wb") as file:
        file.write(b"garbage")
    assert stored_index(store, index.video_id) is None
    assert load_index(index.path, store=store).digest == index.digest
    assert stored_index(store, index.video_id) is not None


@pytest.mark.parametrize("place", [0.0, 0.4])
def test_a_damaged_data_file_is_an_error_of_ours(film, place):
    store, index = film
    uri = fill(index, store)
    path = max(Path(uri).glob("data/*.lance"), key=lambda found: found.stat().st_size)
    content = bytearray(path.read_bytes())
    first = int(place * len(content))
    size = len(content) // 10
    content[first : first + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)

    def read_all() -> None:
        (video,) = open_videos([index], store=store, form=FORM)
        for frame in range(len(video)):
            read_frames(video, [frame])

    with pytest.raises(VideoError, match="ingest"):
        read_all()


def test_names_with_odd_characters(tmp_path):
    path = videos.h264(tmp_path).rename(tmp_path / "Ein Weg #1 + 100%é.mp4")
    store = str(tmp_path / "store")
    index = load_index(str(path), store=store)
    assert index.video_id == f"Ein_Weg_1_100_-{index.digest[:8]}"
    assert load_index(str(path), store=store).digest == index.digest
    fill(index, store)
    assert len(open_videos([index], store=store, form=FORM)[0]) == 14


def test_a_cached_store_is_copied_once_and_read_without_the_original(film, tmp_path):
    store, index = film
    uri = fill(index, store)
    cache = tmp_path / "disk"
    (video,) = open_videos([index], store=store, cache=str(cache), form=FORM)
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(lambda _: local_copy(uri, video.identity, str(cache)), range(4)))
    (copy,) = copies
    assert copy.startswith(str(cache))
    fill(index, store, order=(0,))
    shutil.rmtree(store)
    assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))
    assert sorted(path.suffix for path in cache.iterdir()) == [".lance", ".lock"]


def test_without_room_for_a_copy_frames_are_read_where_they_are(film, tmp_path, caplog):
    store, index = film
    fill(index, store)
    (tmp_path / "file").touch()
    (video,) = open_videos([index], store=store, cache=str(tmp_path / "file"), form=FORM)
    assert read_counter(read_frames(video, [4])[0]) == 12
    assert "no copy could be made" in caplog.text


def test_half_a_copy_gives_its_room_back(film, tmp_path, caplog):
    """Simulate a disk that fills up in the middle of a copy, by limiting the size of the process's files."""
    store, index = film
    uri = fill(index, store)
    cache = tmp_path / "disk"
    (video,) = open_videos([index], store=store, form=FORM)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        place = local_copy(uri, video.identity, str(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place == uri
    assert "no copy could be made" in caplog.text
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_store_that_was_removed_is_an_error_of_ours(film):
    store, index = film
    fill(index, store)
    (video,) = open_videos([index], store=store, form=FORM)
    shutil.rmtree(store)
    with pytest.raises(VideoError, match=r"cannot be read .* again"):
        read_frames(video, [0])


def test_a_store_that_is_made_anew_gets_another_copy(film, tmp_path):
    """A recreated dataset counts versions from 1 again, and its rows are in another order."""
    store, index = film
    cache = str(tmp_path / "disk")
    versions = set()
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        shutil.rmtree(fill(index, store, order=order))
        fill(index, store, order=order)
        (video,) = open_videos([index], store=store, cache=cache, form=FORM)
        versions.add(video.version)
        assert [read_counter(frame) for frame in read_frames(video, range(14))] == list(range(0, 40, 3))
    assert len(versions) == 1
    assert len(list((tmp_path / "disk").glob("*.lance"))) == 2
