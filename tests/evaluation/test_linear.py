from __future__ import annotations

import pytest
import torch

from dora_ray.evaluation.linear import linear_probe, top_share


def blobs(num_images: int, *, seed: int, num_classes: int = 6, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes around orthogonal directions of a 12-dimensional space."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    return torch.eye(12)[labels] + noise * torch.randn(num_images, 12, generator=generator), labels


def test_a_probe_learns_separable_classes():
    scores = linear_probe(
        *blobs(240, seed=0, noise=0.2),
        *blobs(90, seed=1, noise=0.2),
        num_classes=6,
        epochs=20,
        lr=1.0,
        batch_size=64,
        seed=0,
    )
    assert scores["top1"] > 0.95
    assert scores["top5"] >= scores["top1"]


def test_a_probe_of_labels_that_mean_nothing_stays_near_chance():
    (train, labels), (test, test_labels) = blobs(240, seed=0), blobs(600, seed=1)
    shuffled = labels[torch.randperm(240, generator=torch.Generator().manual_seed(5))]
    scores = linear_probe(train, shuffled, test, test_labels, num_classes=6, epochs=20, lr=0.1, batch_size=64, seed=0)
    assert scores["top1"] < 0.45


def test_a_probe_repeats_itself_and_depends_on_its_seed():
    arguments = (*blobs(120, seed=0, noise=1.0), *blobs(500, seed=1, noise=1.0))
    settings = {"num_classes": 6, "epochs": 3, "lr": 2.0, "batch_size": 16}
    first, second = (linear_probe(*arguments, **settings, seed=0) for _ in range(2))
    assert first == second
    assert any(linear_probe(*arguments, **settings, seed=seed) != first for seed in (1, 2, 3))


def test_one_step_is_the_gradient_of_the_cross_entropy():
    """From weights of 0, one batch: w is proportional to the sum of (onehot - 1/C) x; its answers are checked."""
    train, labels = blobs(32, seed=0, num_classes=4)
    test, test_labels = blobs(200, seed=1, num_classes=4, noise=0.6)
    residual = torch.nn.functional.one_hot(labels, 4).double() - 0.25
    logits = test.double() @ (train.double().T @ residual) + residual.sum(dim=0)
    expected = float((logits.argmax(dim=-1) == test_labels).double().mean())
    scores = linear_probe(train, labels, test, test_labels, num_classes=4, epochs=1, lr=1.0, batch_size=999, seed=0)
    assert scores["top1"] == pytest.approx(expected)


def test_top_share_counts_labels_among_the_best():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    labels = torch.tensor([2, 1])
    assert [top_share(logits, labels, best=best) for best in (1, 2, 3, 5)] == [0.0, 0.5, 1.0, 1.0]
