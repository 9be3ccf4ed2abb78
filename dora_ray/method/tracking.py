"""Objects: discovered in a clip's first frame, tracked through all its frames, and turned into masks.

Equation numbers follow the steps of the method: 1-2 discover, 3 makes prototypes distinct, 4 tracks, 5 masks.
Shapes: B clips, T frames, N patches, D width, K objects.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_ray.method.precision import full_precision
from dora_ray.method.sinkhorn import sinkhorn_knopp

Threshold = Literal["clip", "batch", "soft"]


@full_precision
def object_prototypes(cls_attention: Tensor, query: Tensor) -> Tensor:
    """Return prototypes P = A_cls Q of the first frame (equation 2): the queries of the patches that a head attends to.

    Args:
        cls_attention: (B, K, N) CLS-to-patch attention of the drawn heads, not renormalized.
        query: (B, N, D) queries of the patches, heads concatenated, without CLS.

    Returns:
        (B, K, D).
    """
    return torch.einsum("bkn,bnd->bkd", cls_attention, query)


@full_precision
def match_patches(prototypes: Tensor, patches: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Return the balanced soft assignment M* of patches to objects, with cost -Z P^T (equation 3).

    Args:
        prototypes: (B, K, D).
        patches: (B, N, D).
        epsilon: regularization of Sinkhorn-Knopp.
        num_iterations: iterations of Sinkhorn-Knopp, at least 1.

    Returns:
        (B, N, K), without gradient.
    """
    scores = torch.einsum("bnd,bkd->bnk", patches, prototypes)
    return sinkhorn_knopp(scores, epsilon=epsilon, num_iterations=num_iterations)


@full_precision
def assigned_sum(assignment: Tensor, patches: Tensor) -> Tensor:
    """Return refined prototypes P' = M*^T Z (equation 3), each a sum over about N / K patches.

    Args:
        assignment: (B, N, K).
        patches: (B, N, D).

    Returns:
        (B, K, D).
    """
    return torch.einsum("bnk,bnd->bkd", assignment, patches)


def refine_prototypes(prototypes: Tensor, patches: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Make prototypes distinct by distributing the first frame's patches among them (equation 3).

    Nothing is normalized here. P' sums about N / K patches, so it is longer than P, and its maps are sharper.

    Args:
        prototypes: (B, K, D).
        patches: (B, N, D) patch tokens Z of the first frame.
        epsilon: regularization of Sinkhorn-Knopp.
        num_iterations: iterations of Sinkhorn-Knopp; 0 returns the prototypes unchanged (naive cross-attention).

    Returns:
        (B, K, D).
    """
    if num_iterations == 0:
        return prototypes
    assignment = match_patches(prototypes, patches, epsilon=epsilon, num_iterations=num_iterations)
    return assigned_sum(assignment, patches)


@full_precision
def attention_maps(prototypes: Tensor, key: Tensor) -> Tensor:
    """Compute the cross-attention of every prototype with every frame (equation 4).

    The naive loop::

            for each frame t and object i: maps[i, t] = softmax(key[t] @ prototypes[i] / sqrt(D))

    Args:
        prototypes: (B, K, D).
        key: (B, T, N, D) keys of the patches, heads concatenated: D is the full width, not a head's.

    Returns:
        (B, K, T, N), each map summing to 1 over its N patches.
    """
    logits = torch.einsum("bkd,btnd->bktn", prototypes, key)
    return torch.softmax(logits / math.sqrt(key.shape[-1]), dim=-1)


def object_masks(maps: Tensor, *, threshold: Threshold = "clip") -> Tensor:
    """Threshold attention maps into object masks (equation 5).

    Args:
        maps: (B, K, T, N) attention maps.
        threshold: "clip": above the mean over the frame's patches, so that a mask does not depend on other clips; a
            flat map keeps its largest patch. "batch", the released code's rule: the map divided by its L2 norm, above
            the mean over all clips and patches, for each object and frame. "soft": the map divided by its maximum.

    Returns:
        (B, K, T, N) in the maps' type: 0 or 1; for "soft", values up to 1.

    Raises:
        ValueError: unknown threshold.
    """
    if threshold == "clip":
        above = maps > maps.mean(dim=-1, keepdim=True)
        # In a map that is not flat, the largest patch is above the mean anyway.
        return above.scatter(-1, maps.argmax(dim=-1, keepdim=True), True).to(maps.dtype)
    if threshold == "batch":
        unit = F.normalize(maps, dim=-1)
        return (unit > unit.mean(dim=(0, 3), keepdim=True)).to(maps.dtype)
    if threshold == "soft":
        return maps / maps.amax(dim=-1, keepdim=True)
    raise ValueError(f"threshold={threshold!r}: use 'clip', 'batch' or 'soft'")


def random_masks(masks: Tensor, noise: Tensor) -> Tensor:
    """Move the same mask values, and so the same areas, to random patches: the control without objects.

    Args:
        masks: (B, K, T, N) object masks.
        noise: (B, K, T, N) random numbers; the patches with the largest get the largest mask values.

    Returns:
        (B, K, T, N).
    """
    order = noise.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(masks).scatter(-1, order, masks.sort(dim=-1, descending=True).values)
