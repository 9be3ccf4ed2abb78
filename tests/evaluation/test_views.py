"""The views of a video's scenes, and measures beside random encoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dora_ray.errors import ConfigError, VideoError
from dora_ray.evaluation import evaluate, views
from dora_ray.evaluation.beside import beside_random
from dora_ray.video.synthetic import make_video
from dora_ray.video.tour_files import make_tour
from tests.evaluation.checkpoints import small_config, write_checkpoint
from tests.video.test_tours import flat_photographs

READING = {"num_scenes": 8, "gap_seconds": 0.5, "gap_frames": 2, "local_scale": 0.5, "size": 32, "seed": 0}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    return make_video(path, width=96, height=64, num_frames=100, frames_per_second=10, seed=0, cuts=[30, 60])


def test_scenes_are_apart_and_the_last_later_frame_is_in_the_film():
    starts = views.scene_starts(10.0, gap=0.5, num_scenes=64)
    assert len(starts) == 10
    assert np.diff(starts).min() >= 1.0
    assert starts[-1] + 0.5 == 10.0
    assert len(views.scene_starts(100.0, gap=0.5, num_scenes=64)) == 64
    assert views.scene_starts(3.4, gap=0.5, num_scenes=64) is None


def test_a_video_gives_the_frames_at_the_times_asked_for(video):
    """The pictures carry their numbers: scenes lie evenly, and later frames half a second after them."""
    from dora_ray.video.index import index_video
    from dora_ray.video.synthetic import read_counter

    pairs = views._pairs_of_video(index_video(str(video)), num_scenes=5, gap=0.5)
    numbers = [tuple(read_counter(frame) for frame in pair) for pair in pairs]
    expected = np.linspace(0, 9.9 - 0.5, 5)
    assert [first for first, _ in numbers] == [int(start * 10 + 1e-6) for start in expected]
    assert all(later - first == 5 for first, later in numbers)


def test_a_folder_of_frames_is_read_in_order_of_names(tmp_path):
    for number in range(20):
        Image.new("RGB", (40, 30), (number * 10,) * 3).save(tmp_path / f"{number:03d}.png")
    pairs = list(views._pairs(str(tmp_path), num_scenes=4, gap_seconds=9.0, gap_frames=2))
    assert [(int(first[0, 0, 0]), int(later[0, 0, 0])) for first, later in pairs] == [
        (0, 20), (50, 70), (110, 130), (170, 190)
    ]  # fmt: skip


def test_views_have_one_size_and_the_seed_decides(video):
    one, same, other = (views.read_views(video, **(READING | {"seed": seed})) for seed in (0, 0, 1))
    for part in (one.scenes, one.later, one.local):
        assert part.shape == (8, 32, 32, 3)
    assert np.array_equal(one.local, same.local)
    assert not np.array_equal(one.local, other.local)


def test_how_light_a_picture_is_finds_nothing():
    """Gray pictures of one pattern in 60 lights: matching by mean and contrast stays near chance."""
    rng = np.random.default_rng(0)
    pattern = rng.random((32, 32, 1)) * np.ones(3)
    pictures = [np.uint8(pattern * rng.integers(30, 90) + rng.integers(70, 100)) for _ in range(60)]
    first, second = (
        torch.tensor(np.array([[made.mean(), made.std()] for made in drawn]))
        for drawn in ([views.relight(picture, rng) for picture in pictures] for _ in range(2))
    )
    found = torch.cdist(second, first).argmin(dim=1) == torch.arange(60)
    assert found.float().mean() < 0.12


def test_a_change_of_light_keeps_colors_apart():
    rng = np.random.default_rng(0)
    red = np.zeros((8, 8, 3), np.uint8) + np.uint8([160, 90, 90])
    for _ in range(20):
        lit = views.relight(red, rng).astype(int)
        assert (lit[..., 0] - lit[..., 1] >= 0.6 * 70 - 1).all()
        assert (lit[..., 0] - lit[..., 1] <= 1.4 * 70 + 1).all()


def test_what_is_too_short_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no frames"):
        views.read_views(tmp_path, **READING)
    make_video(tmp_path / "v.mp4", width=96, height=64, num_frames=20, frames_per_second=10, seed=0)
    with pytest.raises(VideoError, match="4 scenes need more"):
        views.read_views(tmp_path / "v.mp4", **READING)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())


class TestEvaluate:
    """The tasks as they are called from outside."""

    def test_views_beside_a_random_encoder(self, checkpoint, video):
        found = evaluate(checkpoint, "views", data=video, num_scenes=9, random_encoders=2)["results"]
        assert found["chance"] == pytest.approx(1 / 9)
        mean = (found["view_matching_later"] + found["view_matching_local"]) / 2
        assert found["view_matching"] == pytest.approx(mean)
        low, high = found["view_matching_interval"]
        assert 0 <= low <= found["view_matching"] <= high <= 1
        gain = found["view_matching"] - found["random_view_matching"]
        assert found["view_matching_gain"] == pytest.approx(gain)
        assert 1 <= found["rankme"] <= 9.001
        assert "samples" not in found

    def test_objects_take_tracking_from_the_run_and_options_change_it(self, checkpoint, tmp_path):
        make_tour(
            tmp_path, width=64, height=48, num_frames=60, frames_per_second=4.0, seed=0, photographs=flat_photographs()
        )
        first = evaluate(checkpoint, "objects", data=tmp_path, num_frames=2)
        tracking = small_config()["tracking"]
        assert {name: first["settings"][name] for name in ("num_objects", "epsilon", "block")} == {
            name: tracking[name] for name in ("num_objects", "epsilon", "block")
        }
        assert first["settings"]["image_size"] == 32
        changed = evaluate(checkpoint, "objects", data=tmp_path, num_frames=2, num_objects=3, random_encoders=0)
        assert changed["settings"]["num_objects"] == 3
        assert changed["results"]["object_iou"] != first["results"]["object_iou"]
        assert "random_object_iou" in first["results"]
        assert "random_object_iou" not in changed["results"]

    def test_an_unknown_option_is_told(self, checkpoint, video):
        with pytest.raises(ConfigError, match="Did you mean num_scenes"):
            evaluate(checkpoint, "views", data=video, num_scene=9)


def test_gains_are_paired():
    """A constant gain on clips that differ much has an interval without width."""
    values = np.linspace(0, 1, 11)
    trained = {"iou": float(values.mean() + 0.1), "samples": {"iou": (values + 0.1).tolist()}}
    found = beside_random(trained, [{"samples": {"iou": (values + shift).tolist()}} for shift in (-0.05, 0.05)])
    assert found["random_iou"] == pytest.approx(0.5)
    assert found["iou_gain_interval"] == pytest.approx([0.1, 0.1])
    low, high = found["iou_interval"]
    assert high - low > 0.2
