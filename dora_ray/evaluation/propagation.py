"""Label propagation: transfer labels from earlier frames of a video to the next one by patch similarity.

Legend: H x W pixels, h x w patches, D width, C context frames, L labels (background and K objects).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_TILE = 8  # side of a tile that is compared at once, patches


def propagate(
    features: Tensor, labels: Tensor, target: Tensor, *, radius: int, num_neighbors: int, temperature: float
) -> Tensor:
    """Compute the labels of a frame's patches from those of earlier frames.

        for each patch p of the target:
            near = patches of the context frames at most `radius` rows and columns from p
            best = the num_neighbors of them with the largest <feature, target[p]>
            label[p] = mean of their labels, weighted by exp(<feature, target[p]> / temperature)

    Args:
        features: (C, h, w, D), context frames, L2-normalized.
        labels: (C, h, w, L), shares of each label.
        target: (h, w, D), L2-normalized.
        radius: Largest distance in rows and in columns, patches.
        num_neighbors: Number of patches to average over; fewer in very small frames.
        temperature: Temperature of the weights.

    Returns:
        (h, w, L), each patch summing to 1 where the labels do.
    """
    height, width, num_labels = *target.shape[:2], labels.shape[-1]
    result = labels.new_zeros(height, width, num_labels)
    # Work in tiles: most similarities of a whole frame would be out of the radius and discarded.
    for y, x in itertools.product(range(0, height, _TILE), range(0, width, _TILE)):
        tile = target[y : y + _TILE, x : x + _TILE]
        top, left = max(0, y - radius), max(0, x - radius)
        window = (slice(None), slice(top, y + _TILE + radius), slice(left, x + _TILE + radius))
        near, near_labels = features[window], labels[window].flatten(0, 2)
        similarity = torch.einsum("abd,cyxd->abcyx", tile, near)
        far_rows = _far(y, tile.shape[0], top, near.shape[1], radius=radius, device=target.device)
        far_columns = _far(x, tile.shape[1], left, near.shape[2], radius=radius, device=target.device)
        far = far_rows[:, None, None, :, None] | far_columns[None, :, None, None, :]
        similarity = similarity.masked_fill_(far, -torch.inf).flatten(2)
        best, index = similarity.topk(min(num_neighbors, similarity.shape[-1]), dim=-1)
        weights = torch.softmax(best / temperature, dim=-1)
        result[y : y + _TILE, x : x + _TILE] = torch.einsum("abn,abnl->abl", weights, near_labels[index])
    return result


def _far(start: int, length: int, near_start: int, near_length: int, *, radius: int, device: torch.device) -> Tensor:
    """Return (length, near_length) bool: True if two positions along an axis are more than the radius apart."""
    ours = torch.arange(start, start + length, device=device)
    theirs = torch.arange(near_start, near_start + near_length, device=device)
    return (ours[:, None] - theirs[None, :]).abs() > radius


def segment(
    features: Iterator[Tensor],
    first_masks: np.ndarray,
    *,
    num_frames: int,
    radius: int,
    num_neighbors: int,
    temperature: float,
) -> Iterator[np.ndarray]:
    """Yield the objects' masks of all frames except the first.

    Args:
        features: T tensors (h, w, D), L2-normalized.
        first_masks: (K, H, W) bool, disjoint.
        num_frames: Number of previous frames, besides the first, that labels are propagated from.
        radius: As `propagate`.
        num_neighbors: As `propagate`.
        temperature: As `propagate`.

    Yields:
        T - 1 arrays (K, H, W) bool, disjoint.
    """
    first = next(features)
    height, width = first_masks.shape[1:]
    labels = torch.from_numpy(patch_labels(first_masks, height=first.shape[0], width=first.shape[1])).to(first.device)
    context = [(first, labels)]
    for target in features:
        earlier, earlier_labels = (torch.stack(part) for part in zip(*context, strict=True))
        settings = {"radius": radius, "num_neighbors": num_neighbors}
        labels = propagate(earlier, earlier_labels, target, **settings, temperature=temperature)
        yield enlarge_labels(labels, height=height, width=width)
        context = [context[0], *[*context[1:], (target, labels)][-num_frames:]]


def patch_labels(masks: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Reduce masks (K, H, W) bool to patch labels (h, w, 1 + K) float32; each patch takes its central pixel's label."""
    size, nearest = (width, height), Image.Resampling.NEAREST
    objects = np.stack([np.asarray(Image.fromarray(mask).resize(size, nearest)) for mask in masks], axis=-1)
    background = ~objects.any(axis=-1, keepdims=True)
    return np.concatenate([background, objects], axis=-1).astype(np.float32)


def enlarge_labels(labels: Tensor, *, height: int, width: int) -> np.ndarray:
    """Turn shares (h, w, 1 + K) into masks (K, H, W) bool: upsample, rescale each label to [0, 1], take the largest."""
    size = (height, width)
    large = F.interpolate(labels.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    winner = ((large - low) / (high - low).clamp_min(1e-6)).argmax(dim=0)
    return torch.stack([winner == label for label in range(1, labels.shape[-1])]).cpu().numpy()
