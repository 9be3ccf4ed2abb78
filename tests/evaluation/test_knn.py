from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_ray.errors import ConfigError
from dora_ray.evaluation import knn
from dora_ray.evaluation.knn import knn_accuracies, knn_accuracy, neighbor_votes


def slow_knn(train, train_labels, test, test_labels, *, k, temperature):
    """Float64, one test image and one neighbor at a time."""
    right = 0
    for z, truth in zip(test, test_labels, strict=True):
        similarities = []
        for x, label in zip(train, train_labels, strict=True):
            cosine = sum(a * b for a, b in zip(x, z, strict=True)) / math.sqrt(
                sum(a * a for a in x) * sum(b * b for b in z)
            )
            similarities.append((cosine, label))
        votes: dict[int, float] = {}
        for cosine, label in sorted(similarities, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        right += max(votes, key=votes.__getitem__) == truth
    return right / len(test)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 30), temperature=st.sampled_from([0.02, 0.07, 1.0]))
def test_knn_is_the_slow_loop(seed, k, temperature):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(30, 5)), rng.normal(size=(12, 5))
    train_labels, test_labels = rng.integers(0, 4, size=30), rng.integers(0, 4, size=12)
    expected = slow_knn(
        train.tolist(), train_labels.tolist(), test.tolist(), test_labels.tolist(), k=k, temperature=temperature
    )
    tensors = (torch.from_numpy(values) for values in (train, train_labels, test, test_labels))
    assert knn_accuracy(*tensors, k=k, temperature=temperature) == expected


def test_several_k_share_one_comparison_and_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(50, 8, generator=generator), torch.randn(23, 8, generator=generator)
    train_labels, test_labels = torch.arange(50) % 3, torch.arange(23) % 3
    arguments = (train, train_labels, test, test_labels)
    whole = knn_accuracies(*arguments, neighbors=[10, 1, 50], temperature=0.07)
    monkeypatch.setattr(knn, "_ROWS", 4)
    assert knn_accuracies(*arguments, neighbors=[10, 1, 50], temperature=0.07) == whole
    assert whole == {k: knn_accuracy(*arguments, k=k, temperature=0.07) for k in (10, 1, 50)}


def test_a_close_neighbor_outvotes_two_far_ones():
    similarity, labels = torch.tensor([[0.9, 0.2, 0.1]]), torch.tensor([[0, 1, 1]])
    assert neighbor_votes(similarity, labels, 2, temperature=0.07).argmax() == 0
    assert neighbor_votes(similarity, labels, 2, temperature=100.0).argmax() == 1


def test_votes_do_not_overflow_at_a_tiny_temperature():
    votes = neighbor_votes(torch.tensor([[1.0, 0.5]]), torch.tensor([[1, 0]]), 2, temperature=1e-3)
    assert torch.isfinite(votes).all()
    assert votes.argmax() == 1


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_training_set_is_refused(k):
    with pytest.raises(ConfigError, match=r"1\.\.3"):
        knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), k=k, temperature=0.07)


def test_features_are_normalized():
    train, labels = torch.tensor([[100.0, 1.0], [0.1, 0.2]]), torch.tensor([0, 1])
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 2.0]]), torch.tensor([1]), k=1, temperature=0.07) == 1.0
