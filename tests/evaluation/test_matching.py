"""View matching and RankMe against slow versions written from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dora_ray.evaluation.matching import match_views, rank_me


def slow_match(queries: np.ndarray, gallery: np.ndarray) -> list[float]:
    found = []
    for i, query in enumerate(queries):
        similar = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in gallery]
        winners = [j for j, value in enumerate(similar) if value == max(similar)]
        found.append(1 / len(winners) if i in winners else 0.0)
    return found


def test_a_scene_is_found_where_nothing_is_more_like_it():
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(40, 5, generator=generator)
    queries = gallery * 3 + 2.5 * torch.randn(40, 5, generator=generator)
    found = match_views(queries, gallery)
    assert found.tolist() == slow_match(queries.double().numpy(), gallery.double().numpy())
    assert 0 < found.mean() < 1


def test_equal_features_get_exactly_chance():
    features = torch.ones(8, 3)
    assert match_views(features, features).tolist() == [1 / 8] * 8


def test_length_does_not_matter_and_order_does():
    gallery = torch.eye(6)
    assert match_views(gallery * 7, gallery).mean() == 1
    assert match_views(gallery.roll(1, 0), gallery).mean() == 0


def test_features_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"queries \(3, 2\) and gallery \(4, 2\)"):
        match_views(torch.ones(3, 2), torch.ones(4, 2))


def test_rank_of_known_spectra():
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    assert rank_me(rotation) == pytest.approx(12, rel=1e-4)
    assert rank_me(torch.ones(9, 4)) == pytest.approx(1, abs=1e-3)
    spectrum = torch.tensor([3.0, 1.0])
    shares = [0.75 + 1e-7, 0.25 + 1e-7]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert rank_me(torch.diag(spectrum)) == pytest.approx(expected, rel=1e-9)


def test_features_without_any_length_have_no_direction():
    assert rank_me(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-3)
