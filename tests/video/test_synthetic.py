"""Synthetic videos and image sets."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.video import synthetic
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import index_video


@settings(max_examples=40, deadline=None)
@given(number=st.integers(0, 65535), width=st.integers(80, 700), scale=st.sampled_from([1, 2]))
def test_the_counter_is_read_at_any_scale(number, width, scale):
    picture = np.full((60, width, 3), 90, np.uint8)
    synthetic.paint_counter(picture, number)
    assert synthetic.read_counter(np.kron(picture, np.ones((scale, scale, 1), np.uint8))) == number


def test_a_made_video_has_its_frames_rate_and_numbers(tmp_path):
    path = synthetic.make_video(
        tmp_path / "v.mp4", width=128, height=72, num_frames=30, frames_per_second=29.97, seed=0, group_size=10
    )
    index = index_video(str(path))
    assert (index.width, index.height, len(index.pts), len(index.key_pts)) == (128, 72, 30, 3)
    assert index.average_rate == pytest.approx(29.97, rel=1e-3)
    frames = get_decoder("pyav").decode(index, index.pts, short_side=72)
    assert [synthetic.read_counter(frame.y) for frame in frames] == list(range(30))


def test_pictures_depend_on_the_seed_alone():
    first, again, other = (
        np.stack(list(synthetic.render_frames(width=96, height=64, num_frames=3, seed=seed))) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_objects_move_and_stay_in_the_picture():
    frames = np.stack(list(synthetic.render_frames(width=96, height=64, num_frames=300, seed=4)))
    assert frames.shape == (300, 64, 96, 3)
    assert np.abs(np.diff(frames[:, 10:].astype(int), axis=0)).mean((1, 2, 3)).min() > 0.1


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="the photographs are not installed")
class TestPhotoClasses:
    """Labeled image set from photographs."""

    def test_layout_and_size(self, tmp_path):
        names = synthetic.make_photo_classes(tmp_path, seed=0, size=32, num_train=4, num_test=2)
        assert len(names) == 10
        for split, count in (("train", 4), ("test", 2)):
            assert sorted(p.name for p in (tmp_path / split).iterdir()) == names
            files = list((tmp_path / split).rglob("*.jpg"))
            assert len(files) == 10 * count
            assert {simplejpeg.decode_jpeg_header(f.read_bytes())[:2] for f in files} == {(32, 32)}

    def test_the_seed_decides(self, tmp_path):
        digests = []
        for run, seed in enumerate((0, 0, 1)):
            synthetic.make_photo_classes(tmp_path / str(run), seed=seed, size=16, num_train=2, num_test=1)
            state = hashlib.sha256()
            for file in sorted((tmp_path / str(run)).rglob("*.jpg")):
                state.update(file.read_bytes())
            digests.append(state.hexdigest())
        assert digests[0] == digests[1] != digests[2]

    def test_no_pixel_is_in_both_splits(self):
        """Crops of a picture whose pixels encode their chessboard color: each split sees one color."""
        rows, columns = np.divmod(np.arange(400 * 400).reshape(400, 400), 400)
        board = ((rows // 100 + columns // 100) % 2 * 200).astype(np.uint8)
        texture = np.random.default_rng(0).integers(0, 50, (400, 400), np.uint8)
        picture = Image.fromarray(np.stack([board + texture] * 3, -1))
        original, synthetic._recolored = synthetic._recolored, lambda crop, rng: crop
        try:
            for parity in (0, 1):
                rng = np.random.default_rng(parity)
                crops = np.stack([synthetic._photo_crop(picture, parity, 32, rng) for _ in range(40)])
                assert (crops > 125).all() if parity else (crops < 125).all()
        finally:
            synthetic._recolored = original

    def test_average_color_says_little(self, tmp_path):
        """A nearest-mean-color classifier stays near the 10 % of chance."""
        synthetic.make_photo_classes(tmp_path, seed=0, size=16, num_train=40, num_test=20)

        def means(split):
            files = sorted((tmp_path / split).rglob("*.jpg"))
            return np.array([simplejpeg.decode_jpeg(f.read_bytes()).mean((0, 1)) for f in files]), [
                f.parent.name for f in files
            ]

        (train, labels), (test, truth) = means("train"), means("test")
        nearest = np.linalg.norm(test[:, None] - train, axis=-1).argmin(1)
        accuracy = np.mean([labels[n] == t for n, t in zip(nearest, truth, strict=True)])
        assert accuracy < 0.2


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic, "PHOTOGRAPHS", {"x": ("no_such_package", "a.png")})
    with pytest.raises(ConfigError, match="pip install scikit-image scikit-learn"):
        synthetic.make_photo_classes(tmp_path, seed=0)


def test_an_encoder_leaves_the_process_its_priority(tmp_path: Path) -> None:
    """SVT-AV1 requests the highest real-time priority where permitted."""
    before = os.sched_getscheduler(0)
    pictures = (np.zeros((96, 160, 3), np.uint8) for _ in range(3))
    synthetic.encode_video(
        tmp_path / "v.mp4", pictures, frames_per_second=12, codec="libsvtav1", options={"preset": "12"}
    )
    assert os.sched_getscheduler(0) == before
