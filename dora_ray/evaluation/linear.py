"""Linear probe: a linear classifier on frozen features.

Legend: M training images, Q test images, D width, C classes.

Deviation from DINO's protocol: the features of each image are computed once, from its center crop, without random crops
or flips. This costs some accuracy, but a probe takes seconds instead of hours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_ray.evaluation.features import Progress, counts, extract_splits, last_cls
from dora_ray.evaluation.intervals import share_interval
from dora_ray.evaluation.knn import most_frequent_share
from dora_ray.method.schedules import cosine

if TYPE_CHECKING:
    import os

    from timm.models.vision_transformer import VisionTransformer

_REFERENCE_BATCH = 256


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Train and test a linear classifier: SGD with momentum 0.9, no weight decay, cosine schedule to 0.

    Args:
        train_features: (M, D), not normalized.
        train_labels: (M,) int64.
        test_features: (Q, D).
        test_labels: (Q,) int64.
        num_classes: C.
        epochs: Passes over the training features.
        lr: Learning rate for a batch of 256; the rate used is lr x batch_size / 256.
        batch_size: Images per batch, limited to M.
        seed: Seed of the order of the images; the classifier is initialized with zeros.

    Returns:
        top1, top5 and train_top1 as shares in [0, 1]; top5 uses the min(5, C) best classes.
    """
    batch_size = min(batch_size, len(train_features))
    classifier = _zero_classifier(train_features.shape[1], num_classes, device=train_features.device)
    rate = lr * batch_size / _REFERENCE_BATCH
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(train_features) // batch_size
    for step in range(epochs * steps_per_epoch):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(train_features), generator=generator).to(train_features.device)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, start=rate, end=0.0, num_steps=epochs * steps_per_epoch)
        start = step % steps_per_epoch * batch_size
        batch = order[start : start + batch_size]
        loss = F.cross_entropy(classifier(train_features[batch]), train_labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        test_logits, train_logits = classifier(test_features), classifier(train_features)
    return {
        "top1": top_share(test_logits, test_labels, best=1),
        "top5": top_share(test_logits, test_labels, best=5),
        "train_top1": top_share(train_logits, train_labels, best=1),
    }


def _zero_classifier(width: int, num_classes: int, *, device: torch.device) -> nn.Linear:
    classifier = nn.Linear(width, num_classes, device=device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return classifier


def top_share(logits: Tensor, labels: Tensor, *, best: int) -> float:
    """Return the top-`best` accuracy of logits (Q, C) for labels (Q,); with fewer classes, all of them count."""
    top = logits.topk(min(best, logits.shape[1]), dim=-1).indices
    return int((top == labels[:, None]).any(dim=-1).sum()) / len(labels)


def evaluate_linear(
    backbone: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    image_size: int,
    num_blocks: int,
    epochs: int,
    lr: float,
    probe_batch_size: int,
    probe_seed: int,
    max_images: int | None,
    batch_size: int,
    num_workers: int,
    device: str,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a linear probe on labeled images, on the concatenated CLS tokens of the last blocks.

    Args:
        backbone: On `device`, in evaluation mode.
        data: FOLDER/train/CLASS/* and FOLDER/test/CLASS/*.
        image_size: Side of the square images, pixels.
        num_blocks: Number of last blocks whose CLS tokens form the feature (4 for ViT-S), at most the encoder's depth.
        epochs: As `linear_probe`.
        lr: As `linear_probe`.
        probe_batch_size: The `batch_size` of `linear_probe`.
        probe_seed: The `seed` of `linear_probe`.
        max_images: Images per split, evenly spaced over its list; None: all.
        batch_size: Images per forward pass.
        num_workers: Threads that read images.
        device: Device of the encoder and the classifier.
        skip_unreadable: Leave out images that cannot be read, with a warning.
        progress: Called with the number of images done and the total.

    Returns:
        top1 and its 95 % interval, top5, train_top1, chance (share of the most frequent test class) and counts.

    Raises:
        ConfigError: As `find_splits`, or an image cannot be read.
    """
    num_blocks = min(num_blocks, len(backbone.blocks))
    encode = last_cls(backbone, num_blocks=num_blocks)
    (train_features, train), (test_features, test) = extract_splits(
        encode,
        data,
        max_images=max_images,
        size=image_size,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        skip_unreadable=skip_unreadable,
        progress=progress,
    )
    scores = linear_probe(
        train_features.to(device),
        train.labels.to(device),
        test_features.to(device),
        test.labels.to(device),
        num_classes=len(train.classes),
        epochs=epochs,
        lr=lr,
        batch_size=probe_batch_size,
        seed=probe_seed,
    )
    return {
        **scores,
        "top1_interval": share_interval(scores["top1"] * len(test.paths), len(test.paths)),
        "chance": most_frequent_share(test.labels),
        **counts(train, test),
        "num_blocks": num_blocks,
    }
