"""Measures without labels: view matching, and the effective rank of features (RankMe).

Legend: N scenes, M features, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RANK_EPSILON = 1e-7


def match_views(queries: Tensor, gallery: Tensor) -> Tensor:
    """Return which scenes are retrieved by cosine similarity (held-out view matching).

        for each scene i:
            similar = [cosine(queries[i], gallery[j]) for j in range(N)]
            found[i] = similar[i] == max(similar), divided by the number of ties

    The chance level of the mean over scenes is 1 / N, which constant features also get.

    Args:
        queries: (N, D), another view of each scene, such as a later frame or a local crop.
        gallery: (N, D), the scenes themselves, in the same order.

    Returns:
        (N,) float32 in [0, 1], on the features' device.

    Raises:
        ValueError: The shapes differ.
    """
    if queries.shape != gallery.shape or queries.ndim != 2:
        raise ValueError(f"queries {tuple(queries.shape)} and gallery {tuple(gallery.shape)} must both be (N, D)")
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T
    best = similarity == similarity.amax(dim=-1, keepdim=True)
    return best.diagonal().float() / best.sum(dim=-1)


def rank_me(features: Tensor) -> float:
    """Return the effective rank of features: RankMe (Garrido et al., ICML 2023).

    It is exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7 and s the singular values: min(M, D) if all directions
    are used equally, 1 if there is only one.

    Args:
        features: (M, D), the encoder's output, neither centered nor normalized.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + _RANK_EPSILON
    return float((-shares * shares.log()).sum().exp())
