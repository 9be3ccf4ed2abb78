from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dora_ray import evaluate
from dora_ray.errors import ConfigError
from dora_ray.evaluation import vos
from dora_ray.evaluation.vos import (
    boundary,
    boundary_accuracy,
    dilate,
    enlarge_labels,
    find_sequences,
    propagate,
    read_mask,
    region_similarity,
    segment,
)
from tests.evaluation.checkpoints import small_config, write_checkpoint


def slow_propagate(features, labels, target, *, radius, num_neighbors, temperature):
    """Float64, one patch and one neighbor at a time."""
    num_context, height, width, _ = features.shape
    result = np.zeros((height, width, labels.shape[-1]))
    for y in range(height):
        for x in range(width):
            near = []
            for c in range(num_context):
                for v in range(height):
                    for u in range(width):
                        if abs(v - y) <= radius and abs(u - x) <= radius:
                            near.append((float(features[c, v, u] @ target[y, x]), c, v, u))
            best = sorted(near, reverse=True)[:num_neighbors]
            weights = [math.exp(similarity / temperature) for similarity, *_ in best]
            for weight, (_, c, v, u) in zip(weights, best, strict=True):
                result[y, x] += weight / sum(weights) * labels[c, v, u]
    return result


@pytest.mark.parametrize("tile", [2, 3, 8])
@pytest.mark.parametrize(("radius", "num_neighbors"), [(1, 5), (0, 5), (2, 1), (9, 500)])
def test_propagation_is_the_slow_loop(monkeypatch, radius, num_neighbors, tile):
    monkeypatch.setattr(vos, "_TILE", tile)
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64), dim=-1)
    target = F.normalize(torch.randn(4, 5, 6, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.rand(3, 4, 5, 2, generator=generator, dtype=torch.float64)
    settings = {"radius": radius, "num_neighbors": num_neighbors, "temperature": 0.1}
    expected = slow_propagate(features.numpy(), labels.numpy(), target.numpy(), **settings)
    np.testing.assert_allclose(propagate(features, labels, target, **settings), expected, rtol=1e-9)


def test_a_moving_object_is_followed():
    """Patches carry their own identity: the object's features move one column a frame, and its mask must too.

    Background patches also share a direction, so that what the object uncovers is like the rest of the background.
    """
    generator = torch.Generator().manual_seed(1)
    height, width, num_frames = 6, 12, 5
    scene = F.normalize(torch.randn(height, width, 32, generator=generator) + 8 * torch.eye(32)[0], dim=-1)
    thing = F.normalize(torch.randn(2, 3, 32, generator=generator), dim=-1)
    frames, truths = [], []
    for t in range(num_frames):
        frame, truth = scene.clone(), np.zeros((height, width), bool)
        frame[2:4, 2 + t : 5 + t], truth[2:4, 2 + t : 5 + t] = thing, True
        frames.append(frame)
        truths.append(truth)
    settings = {"num_frames": 2, "radius": 3, "num_neighbors": 1, "temperature": 0.1}
    found = list(segment(iter(frames), truths[0], **settings))
    assert len(found) == num_frames - 1
    for mask, truth in zip(found, truths[1:], strict=True):
        np.testing.assert_array_equal(mask, truth)


def test_labels_come_from_the_first_and_the_last_frames_only(monkeypatch):
    frames = [torch.eye(5)[t].expand(2, 2, 5) for t in range(5)]
    contexts = []

    def watched(features, labels, target, **settings):
        contexts.append(features[:, 0, 0].argmax(dim=-1).tolist())
        return propagate(features, labels, target, **settings)

    monkeypatch.setattr(vos, "propagate", watched)
    first = np.array([[True, False], [True, False]])
    list(segment(iter(frames), first, num_frames=2, radius=2, num_neighbors=4, temperature=0.1))
    assert contexts == [[0], [0, 1], [0, 1, 2], [0, 2, 3]]


def test_enlarged_labels_are_stretched_before_they_compete():
    labels = torch.full((4, 4, 2), 0.1)
    labels[..., 0] = 0.9
    labels[1:3, 1:3] = torch.tensor([0.6, 0.4])  # the object never reaches half, but stands out
    mask = enlarge_labels(labels, height=16, width=16)
    assert mask[6:10, 6:10].all()
    assert not mask[0].any()


def test_region_similarity_counts_pixels():
    first, second = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert region_similarity(first, second) == 1.0
    first[:2], second[1:3] = True, True
    assert region_similarity(first, second) == pytest.approx(4 / 12)


@pytest.mark.parametrize("radius", [0, 1, 2, 5])
def test_dilation_is_all_pixels_within_the_radius(radius):
    mask = np.random.default_rng(0).random((17, 23)) > 0.97
    rows, columns = np.indices(mask.shape)
    expected = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        expected |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    np.testing.assert_array_equal(dilate(mask, radius=radius), expected)


def test_a_boundary_is_where_a_mask_changes():
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    expected = np.zeros((6, 6), bool)
    expected[1:4, 1:4] = True
    expected[2, 2] = False
    np.testing.assert_array_equal(boundary(mask), expected)


def test_boundary_accuracy_forgives_small_shifts_only():
    truth = np.zeros((480, 854), bool)
    truth[100:300, 200:500] = True
    assert boundary_accuracy(truth, truth) == 1.0
    assert boundary_accuracy(np.roll(truth, 8, axis=1), truth) == 1.0
    assert 0.3 < boundary_accuracy(np.roll(truth, 12, axis=1), truth) < 0.7
    assert boundary_accuracy(np.zeros_like(truth), truth) == 0.0
    assert boundary_accuracy(np.zeros_like(truth), np.zeros_like(truth)) == 1.0


@pytest.fixture
def davis(tmp_path):
    """Two sequences of a bright square that moves over noise."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        images, masks = tmp_path / "JPEGImages" / "480p" / name, tmp_path / "Annotations" / "480p" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        background = rng.integers(30, 90, size=(48, 80, 3), dtype=np.uint8)
        for t in range(5):
            frame, mask = background.copy(), np.zeros((48, 80), np.uint8)
            frame[12:36, 10 + 4 * t : 34 + 4 * t], mask[12:36, 10 + 4 * t : 34 + 4 * t] = (230, 200, 40), 255
            Image.fromarray(frame).save(images / f"{t:05d}.jpg", quality=95)
            Image.fromarray(mask).save(masks / f"{t:05d}.png")
    return tmp_path


def test_vos_through_evaluate(davis, tmp_path_factory):
    """An untrained encoder keeps color, so it follows a square whose color is its own."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run") / "step-00000007", small_config())
    result = evaluate(checkpoint, "vos", data=davis, short_side=96)
    assert json.loads(json.dumps(result)) == result
    numbers = result["results"]
    assert sorted(numbers["sequences"]) == ["one", "two"]
    assert numbers["sequences"]["one"]["num_frames"] == 5
    assert numbers["j_mean"] > 0.6
    assert numbers["j_and_f"] == pytest.approx((numbers["j_mean"] + numbers["f_mean"]) / 2)
    assert (
        evaluate(checkpoint, "vos", data=davis, short_side=48, max_frames=3)["results"]["sequences"]["two"][
            "num_frames"
        ]
        == 3
    )


def test_palettes_and_gray_masks_are_read_alike(tmp_path):
    mask = np.zeros((4, 5), np.uint8)
    mask[1:3, 2:] = 1
    palette = Image.fromarray(mask, mode=None).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "p.png")
    Image.fromarray(mask * 255).save(tmp_path / "l.png")
    for name in ("p.png", "l.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), mask > 0)


def test_other_layouts_are_refused(davis, tmp_path_factory):
    with pytest.raises(ConfigError, match="not laid out as DAVIS"):
        find_sequences(tmp_path_factory.mktemp("empty"))
    (davis / "Annotations" / "480p" / "one" / "00002.png").unlink()
    with pytest.raises(ConfigError, match="5 frames and 4 masks"):
        find_sequences(davis)
