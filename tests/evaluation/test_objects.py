"""Object and tracking IoU on masks made by hand, against slow versions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.evaluation import objects
from dora_ray.evaluation.labeled_clips import find_clips
from dora_ray.method.vit import build_vit
from dora_ray.video.tour_files import make_tour, palette_png
from tests.video.test_tours import flat_photographs

TRACKING = {
    "block": -1,
    "normalize_patches": True,
    "num_iterations": 5,
    "epsilon": 0.05,
    "threshold": "clip",
    "device": "cpu",
}


def slow_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    both = sum(bool(a) and bool(b) for a, b in zip(mask, truth, strict=True))
    any_ = sum(bool(a) or bool(b) for a, b in zip(mask, truth, strict=True))
    return both / any_ if any_ else 0.0


def slow_best(scores: np.ndarray) -> float:
    """Largest sum over all ways to match rows and columns."""
    if scores.shape[0] > scores.shape[1]:
        scores = scores.T
    columns = range(scores.shape[1])
    return max(
        sum(scores[row, column] for row, column in enumerate(order))
        for order in itertools.permutations(columns, scores.shape[0])
    )


def test_overlaps_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    masks, truths = rng.random((4, 30)) > 0.6, rng.random((3, 30)) > 0.5
    masks[1] = truths[2] = False
    found = objects.mask_overlaps(torch.from_numpy(masks), torch.from_numpy(truths))
    expected = [[slow_iou(mask, truth) for truth in truths] for mask in masks]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 3), (2, 5), (6, 3), (5, 5)])
def test_the_assignment_is_the_best_of_all(shape):
    rng = np.random.default_rng(shape[0] * 10 + shape[1])
    for _ in range(30):
        scores = np.round(rng.random(shape), 1)  # ties too
        rows = objects.best_assignment(scores.tolist())
        used = [row for row in rows if row is not None]
        assert len(rows) == shape[1]
        assert len(used) == len(set(used)) == min(shape)
        total = sum(scores[row, column] for column, row in enumerate(rows) if row is not None)
        assert total == pytest.approx(slow_best(scores))


def strip(*spans: tuple[int, int]) -> torch.Tensor:
    """(T, 10) bool: pixels start to stop of each frame."""
    return torch.tensor([[start <= pixel < stop for pixel in range(10)] for start, stop in spans])


class TestClipScores:
    """One clip of 10 pixels: object 1 moves to the right, object 2 leaves."""

    ids = torch.tensor([[1, 1, 0, 0, 0, 0, 2, 2, 2, 2], [0, 1, 1, 0, 0, 0, 0, 0, 2, 2], [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]])

    def score(self, *masks: torch.Tensor, least_area: float = 0.0):
        return objects.clip_scores(torch.stack(masks), self.ids, least_area=least_area)

    def test_perfect_masks_in_any_order_score_1(self):
        one, two = (self.ids == number for number in (1, 2))
        assert self.score(two, one) == (1.0, 1.0)

    def test_a_missed_object_counts_0(self):
        assert self.score(self.ids == 1) == (0.5, 0.5)

    def test_more_masks_than_objects_cost_nothing(self):
        one, two, none = self.ids == 1, self.ids == 2, strip((0, 10), (0, 10), (0, 10))
        assert self.score(none, two, one) == (1.0, 1.0)

    def test_the_pairs_of_the_first_frame_are_kept(self):
        """Masks that swap their objects after the first frame are right at first and wrong after it."""
        one, two = self.ids == 1, self.ids == 2
        swapped = [torch.cat([first[:1], second[1:]]) for first, second in ((one, two), (two, one))]
        assert self.score(*swapped) == (1.0, 0.0)

    def test_overlaps_by_hand(self):
        # Object 1: 1/3 at first, then 2/3 and 1/2. Object 2: 4/4, then 2/4; it is not there in the last frame.
        first, second = strip((1, 3), (0, 3), (2, 6)), strip((6, 10), (6, 10), (6, 10))
        found = self.score(first, second)
        assert found == pytest.approx(((1 / 3 + 1) / 2, ((2 / 3 + 1 / 2) / 2 + 1 / 2) / 2))

    def test_small_objects_are_left_out_frame_by_frame(self):
        one, two = self.ids == 1, self.ids == 2
        # Object 1 has 2 pixels of 10 in each frame, object 2 has 4, then 2.
        assert self.score(two, least_area=0.3) == (1.0, None)
        assert self.score(one, two, least_area=0.2) == (1.0, 1.0)

    def test_a_clip_without_objects_has_no_score(self):
        masks = strip((0, 3))[None]
        assert objects.clip_scores(masks, torch.zeros(1, 10, dtype=torch.uint8), least_area=0.0) is None


def test_chances_have_the_areas_of_the_masks_and_moved_ones_their_shape():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 3, 2, 24, generator=generator) > 0.7).float()
    noise = torch.rand(masks.shape, generator=generator)
    kinds = objects.with_chances(masks, noise, grid=(4, 6), size=(8, 12))
    for part in kinds.values():
        assert part.shape == (2, 3, 2, 96)
        assert torch.equal(part.sum(-1), 4 * masks.sum(-1).long())
    pixels, moved = (kinds[name].unflatten(-1, (8, 12)) for name in ("", "_moved_masks"))
    assert torch.equal(pixels.roll((4, 6), (-2, -1)), moved)
    assert torch.equal(pixels[..., ::2, ::2].flatten(-2), masks.bool())


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    out = tmp_path_factory.mktemp("tour")
    make_tour(
        out, width=64, height=48, num_frames=96, frames_per_second=4.0, seed=0, sequence_seconds=6.0,
        photographs=flat_photographs(),
    )  # fmt: skip
    return out


def small_vit():
    torch.manual_seed(0)
    vit = build_vit(
        name="vit_tiny_patch16_224", width=24, depth=2, num_heads=3, patch_size=8, image_size=32, drop_path=0.0
    )
    return vit.eval()


SETTINGS = TRACKING | {"image_size": 32, "stride": 2, "num_draws": 2, "least_area": 0.01, "draw_seed": 0}


def test_a_tour_is_scored_and_the_seed_decides(tour):
    settings = SETTINGS | {"num_frames": 3, "num_objects": 2, "max_clips": 5}
    one, same, other = (
        objects.evaluate_objects(small_vit(), tour, **(settings | {"draw_seed": seed})) for seed in (0, 0, 1)
    )
    assert one == same != other
    assert one["num_clips"] <= 5
    assert len(one["samples"]["object_iou"]) == one["num_clips"]
    for name in ("object_iou", "tracking_iou"):
        assert one[name] == pytest.approx(np.mean(one["samples"][name]))
        for kind in ("", "_random_masks", "_moved_masks"):
            assert 0 < one[name + kind] < 1


def test_masks_that_know_the_truth_score_1(tmp_path, monkeypatch):
    """The tracker is replaced by the true objects; what is left is reading, matching and averaging."""
    settings = {"width": 64, "height": 48, "frames_per_second": 4.0, "seed": 0, "num_objects": 2}
    make_tour(tmp_path, num_frames=40, photographs=flat_photographs(), **settings)
    clips = find_clips(tmp_path, num_frames=2, stride=1, max_clips=4)
    truths = iter([clip.read()[1] for clip in clips])
    monkeypatch.setattr(objects, "BATCH_SIZE", 1)

    def true_objects(tracked, heads, **settings):
        ids = next(truths)
        known = sorted(set(np.unique(ids[0])) - {0})
        masks = np.zeros((heads.shape[1], 2, 48, 64), np.float32)
        masks[: len(known)] = np.stack([ids == number for number in known])
        return type("Found", (), {"masks": torch.from_numpy(masks).flatten(2)[None]})

    monkeypatch.setattr(objects, "track_objects", true_objects)
    monkeypatch.setattr(
        objects,
        "with_chances",
        lambda masks, noise, *, grid, size: {"": objects.enlarge_masks(masks.unflatten(-1, (48, 64)), size=size)},
    )
    settings = SETTINGS | {"num_frames": 2, "stride": 1, "num_objects": 3, "max_clips": 4, "num_draws": 1}
    found = objects.evaluate_objects(small_vit(), tmp_path, **settings)
    assert (found["object_iou"], found["tracking_iou"], found["num_clips"]) == (1.0, 1.0, 4)


def test_more_objects_than_heads_are_refused(tour):
    with pytest.raises(ConfigError, match="use 1 to 3"):
        objects.evaluate_objects(small_vit(), tour, **SETTINGS, num_frames=2, num_objects=4, max_clips=1)


class TestLayout:
    """DAVIS's folders."""

    def write(self, root, frames=5, masks=5):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / "dog").mkdir(parents=True)
        for number in range(frames):
            Image.new("RGB", (16, 8)).save(root / f"JPEGImages/480p/dog/{number:05d}.jpg")
        for number in range(masks):
            ids = np.full((8, 16), 255, np.uint8)
            ids[:4] = 2
            (root / f"Annotations/480p/dog/{number:05d}.png").write_bytes(palette_png(ids))

    def test_clips_share_no_frame_and_void_is_no_object(self, tmp_path):
        self.write(tmp_path)
        clips = find_clips(tmp_path, num_frames=2, stride=1, max_clips=None)
        assert [[path.stem for path in clip.frames] for clip in clips] == [["00000", "00001"], ["00002", "00003"]]
        frames, ids = clips[0].read()
        assert frames.shape == (2, 8, 16, 3)
        assert set(np.unique(ids)) == {0, 2}

    def test_strides_skip_frames(self, tmp_path):
        self.write(tmp_path)
        (clip,) = find_clips(tmp_path, num_frames=3, stride=2, max_clips=None)
        assert [path.stem for path in clip.masks] == ["00000", "00002", "00004"]

    def test_what_is_missing_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match="no labeled clips"):
            find_clips(tmp_path, num_frames=2, stride=1, max_clips=None)
        self.write(tmp_path, masks=3)
        with pytest.raises(ConfigError, match=r"00003\.jpg has no mask"):
            find_clips(tmp_path, num_frames=2, stride=1, max_clips=None)
        with pytest.raises(ConfigError, match="no sequence of 9 labeled frames"):
            find_clips(tmp_path, num_frames=9, stride=1, max_clips=None)


@pytest.mark.parametrize("kind", ["255", "color"])
def test_a_single_object_in_255_or_in_a_color_is_an_object(tmp_path, kind):
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / folder / "480p" / "dog").mkdir(parents=True)
    ids = np.zeros((8, 16), np.uint8)
    ids[:4] = 255
    mask = Image.fromarray(ids if kind == "255" else np.stack([ids, ids * 0, ids * 0], axis=-1))
    for number in range(2):
        Image.new("RGB", (16, 8)).save(tmp_path / f"JPEGImages/480p/dog/{number:05d}.jpg")
        mask.save(tmp_path / f"Annotations/480p/dog/{number:05d}.png")
    (clip,) = find_clips(tmp_path, num_frames=2, stride=1, max_clips=None)
    for found in clip.read()[1]:
        np.testing.assert_array_equal(found, ids > 0)
