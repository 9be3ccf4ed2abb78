"""Object tracker: from the teacher's features to the objects of a batch of clips (equations 1 to 5).

Shapes: B clips, T frames, N patches, K objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dora_ray.method.measures import sinkhorn_residual
from dora_ray.method.precision import full_precision
from dora_ray.method.tracking import (
    Threshold,
    assigned_sum,
    attention_maps,
    match_patches,
    object_masks,
    object_prototypes,
)
from dora_ray.method.vit import Tracked


@dataclass(frozen=True)
class Objects:
    """Objects of a batch of clips.

    Attributes:
        maps: (B, K, T, N) attention maps, each summing to 1.
        masks: (B, K, T, N) masks of the objects, 0 to 1.
        residual: remaining imbalance of the objects after Sinkhorn-Knopp; 0 without it.
    """

    maps: Tensor
    masks: Tensor
    residual: Tensor


def track_objects(
    tracked: Tracked,
    heads: Tensor,
    *,
    normalize_patches: bool,
    num_iterations: int,
    epsilon: float,
    threshold: Threshold,
) -> Objects:
    """Discover the objects of each clip's first frame and track them (equations 1 to 5).

    Args:
        tracked: features of the teacher.
        heads: (B, K) int64 attention heads, each the seed of an object; distinct within a clip.
        normalize_patches: L2-normalize the patch tokens in the cost and in the prototypes.
        num_iterations: iterations of Sinkhorn-Knopp; 0 is naive cross-attention.
        epsilon: regularization of Sinkhorn-Knopp.
        threshold: rule of the masks, see `object_masks`.
    """
    num_patches = tracked.patches0.shape[1]
    cls_attention = tracked.cls_attention0.gather(1, heads.unsqueeze(-1).expand(-1, -1, num_patches))
    prototypes = object_prototypes(cls_attention, tracked.query0)
    residual = prototypes.new_zeros(())
    if num_iterations > 0:
        patches = _unit(tracked.patches0) if normalize_patches else tracked.patches0
        assignment = match_patches(prototypes, patches, epsilon=epsilon, num_iterations=num_iterations)
        residual = sinkhorn_residual(assignment)
        prototypes = assigned_sum(assignment, patches)
    maps = attention_maps(prototypes, tracked.key)
    return Objects(maps, object_masks(maps, threshold=threshold), residual)


@full_precision
def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)
