from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dora_ray.evaluation import propagation
from dora_ray.evaluation.propagation import enlarge_labels, patch_labels, propagate, segment


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
    monkeypatch.setattr(propagation, "_TILE", tile)
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
    found = list(segment(iter(frames), truths[0][None], **settings))
    assert len(found) == num_frames - 1
    for mask, truth in zip(found, truths[1:], strict=True):
        np.testing.assert_array_equal(mask, truth[None])


def test_labels_come_from_the_first_and_the_last_frames_only(monkeypatch):
    frames = [torch.eye(5)[t].expand(2, 2, 5) for t in range(5)]
    contexts = []

    def watched(features, labels, target, **settings):
        contexts.append(features[:, 0, 0].argmax(dim=-1).tolist())
        return propagate(features, labels, target, **settings)

    monkeypatch.setattr(propagation, "propagate", watched)
    first = np.array([[[True, False], [True, False]]])
    list(segment(iter(frames), first, num_frames=2, radius=2, num_neighbors=4, temperature=0.1))
    assert contexts == [[0], [0, 1], [0, 1, 2], [0, 2, 3]]


def test_enlarged_labels_are_stretched_before_they_compete():
    labels = torch.full((4, 4, 2), 0.1)
    labels[..., 0] = 0.9
    labels[1:3, 1:3] = torch.tensor([0.6, 0.4])  # the object never reaches half, but stands out
    (mask,) = enlarge_labels(labels, height=16, width=16)
    assert mask[6:10, 6:10].all()
    assert not mask[0].any()


def test_several_objects_move_each_its_own_way_and_share_no_pixel():
    """As above, with three objects: two move, one leaves the picture and its label ends."""
    generator = torch.Generator().manual_seed(2)
    height, width, num_frames = 8, 12, 5
    scene = F.normalize(torch.randn(height, width, 32, generator=generator) + 8 * torch.eye(32)[0], dim=-1)
    things = F.normalize(torch.randn(3, 2, 2, 32, generator=generator), dim=-1)
    frames, truths = [], []
    for t in range(num_frames):
        frame, truth = scene.clone(), np.zeros((3, height, width), bool)
        for k, (y, x) in enumerate(((0, t), (3, 9 - t), (6, 10 + 2 * t))):
            if x < width:
                frame[y : y + 2, x : x + 2] = things[k]
                truth[k, y : y + 2, x : x + 2] = True
        frames.append(frame)
        truths.append(truth)
    settings = {"num_frames": 2, "radius": 3, "num_neighbors": 1, "temperature": 0.1}
    for mask, truth in zip(segment(iter(frames), truths[0], **settings), truths[1:], strict=True):
        np.testing.assert_array_equal(mask, truth)
        assert mask.sum(axis=0).max() <= 1


def test_labels_of_patches_are_those_of_their_middle_pixels():
    masks = np.zeros((2, 8, 12), bool)
    masks[0, :4, :6], masks[1, 4:, 6:] = True, True
    labels = patch_labels(masks, height=2, width=2)
    assert labels.argmax(axis=-1).tolist() == [[1, 0], [0, 2]]
    assert (labels.sum(axis=-1) == 1).all()
