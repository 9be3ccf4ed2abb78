"""Weighted nearest neighbors: measures how well frozen features group the images of a class, without training.

Legend: M training images, Q test images, D width, C classes, k neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.evaluation.features import Progress, counts, extract_splits, final_cls
from dora_ray.evaluation.intervals import share_interval

if TYPE_CHECKING:
    import os

    from timm.models.vision_transformer import VisionTransformer

_ROWS = 1024  # test images compared at a time: bounds the similarity matrix to 1024 x M


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float,
) -> float:
    """Return the share of test images whose class wins the vote of their k nearest training images.

    A neighbor votes for its class with weight exp(cosine similarity / temperature) (Wu et al. 2018; DINO).

        for each test feature z:
            votes = zeros(C)
            for i in k nearest training features x_i of z:
                votes[label_i] += exp(<x_i, z> / temperature)
            right += argmax(votes) == label of z

    Args:
        train_features: (M, D), normalized by this function.
        train_labels: (M,) int64.
        test_features: (Q, D), normalized by this function.
        test_labels: (Q,) int64.
        k: Number of neighbors, at most M.
        temperature: Temperature of the votes.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ConfigError: k is less than 1 or more than M.
    """
    return knn_accuracies(
        train_features, train_labels, test_features, test_labels, neighbors=[k], temperature=temperature
    )[k]


def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    neighbors: Sequence[int],
    temperature: float,
) -> dict[int, float]:
    """Compute `knn_accuracy` for several k from one comparison of all features."""
    num_train, most = len(train_features), max(neighbors)
    if min(neighbors) < 1 or most > num_train:
        raise ConfigError(f"k={list(neighbors)} with {num_train} training images: each k must be in 1..{num_train}.")
    train, test = F.normalize(train_features, dim=-1), F.normalize(test_features, dim=-1)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = dict.fromkeys(neighbors, 0)
    for rows, labels in zip(torch.split(test, _ROWS), torch.split(test_labels, _ROWS), strict=True):
        similarity, index = (rows @ train.T).topk(most, dim=-1)
        for k in right:
            votes = neighbor_votes(similarity[:, :k], train_labels[index[:, :k]], num_classes, temperature=temperature)
            right[k] += int((votes.argmax(dim=-1) == labels).sum())
    return {k: count / len(test) for k, count in right.items()}


def neighbor_votes(similarity: Tensor, labels: Tensor, num_classes: int, *, temperature: float) -> Tensor:
    """Sum the votes of each image's neighbors: similarity (Q, k) and labels (Q, k) to (Q, C)."""
    # One factor for all votes of a row keeps exp(1 / temperature) from overflowing and does not change the winner.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)


def evaluate_knn(
    backbone: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    image_size: int,
    neighbors: Sequence[int],
    temperature: float,
    max_images: int | None,
    batch_size: int,
    num_workers: int,
    device: str,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate weighted nearest neighbors on a folder of labeled images.

    Args:
        backbone: On `device`, in evaluation mode.
        data: FOLDER/train/CLASS/* and FOLDER/test/CLASS/*.
        image_size: Side of the square images, pixels.
        neighbors: Values of k; the first gives the headline score (fixed beforehand, not selected on test images).
            Values above the number of training images are lowered to it, which the result reports.
        temperature: Temperature of the votes.
        max_images: Images per split, evenly spaced over its list; None: all.
        batch_size: Images per forward pass.
        num_workers: Threads that read images.
        device: Device of the encoder and of the comparison.
        skip_unreadable: Leave out images that cannot be read, with a warning.
        progress: Called with the number of images done and the total.

    Returns:
        top1, its 95 % interval and its k, top1_by_k, temperature, k_lowered_to (or None), chance (share of the most
        frequent test class) and counts.

    Raises:
        ConfigError: As `find_splits`, or an image cannot be read.
    """
    (train_features, train), (test_features, test) = extract_splits(
        final_cls(backbone),
        data,
        max_images=max_images,
        size=image_size,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        skip_unreadable=skip_unreadable,
        progress=progress,
    )
    num_train = len(train.paths)
    allowed = list(dict.fromkeys(min(k, num_train) for k in neighbors))
    accuracies = knn_accuracies(
        train_features.to(device),
        train.labels.to(device),
        test_features.to(device),
        test.labels.to(device),
        neighbors=allowed,
        temperature=temperature,
    )
    return {
        "top1": accuracies[allowed[0]],
        "top1_interval": share_interval(accuracies[allowed[0]] * len(test.paths), len(test.paths)),
        "k": allowed[0],
        "top1_by_k": {str(k): accuracy for k, accuracy in accuracies.items()},
        "temperature": temperature,
        "k_lowered_to": num_train if max(neighbors) > num_train else None,
        "chance": most_frequent_share(test.labels),
        **counts(train, test),
    }


def most_frequent_share(labels: Tensor) -> float:
    """Return the accuracy of always answering the most frequent class, from labels (Q,) int64."""
    return int(torch.bincount(labels).max()) / len(labels)
