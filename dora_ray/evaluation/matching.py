"""Measures without labels: is a scene found again among others, and how many directions do features use?

Legend: N scenes, M features, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_RANK_EPSILON = 1e-7


def match_views(queries: Tensor, gallery: Tensor) -> Tensor:
    """Tell which scenes are found again by cosine similarity: held-out view matching.

        for each scene i:
            similar = [cosine(queries[i], gallery[j]) for j in range(N)]
            found[i] = similar[i] == max(similar), shared equally with those that tie with it

    The mean over scenes has chance 1 / N, which is also what features get that are all equal.

    Args:
        queries: (N, D) another view of each scene, such as a later frame or a local crop.
        gallery: (N, D) the scenes themselves, in the same order.

    Returns:
        (N,) float32 in [0, 1], on the features' device.

    Raises:
        ValueError: The two differ in shape.
    """
    if queries.shape != gallery.shape or queries.ndim != 2:
        raise ValueError(f"queries {tuple(queries.shape)} and gallery {tuple(gallery.shape)} must both be (N, D)")
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T
    best = similarity == similarity.amax(dim=-1, keepdim=True)
    return best.diagonal().float() / best.sum(dim=-1)


def rank_me(features: Tensor) -> float:
    """Count the directions that features use: RankMe (Garrido et al., ICML 2023).

    It is exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7, s being the singular values: min(M, D) when all
    directions are used alike, 1 when there is only one.

    Args:
        features: (M, D), as the encoder gives them: neither centered nor normalized.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + _RANK_EPSILON
    return float((-shares * shares.log()).sum().exp())
