"""Diagnostic measures, since self-supervised learning fails silently. All are 0-dimensional and detached.

Shapes: B clips, T frames, N patches, K objects, V views, G global views, O head outputs, P the head's bottleneck.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_ray.method.losses import teacher_probabilities
from dora_ray.method.precision import full_precision

Measures = dict[str, Tensor]


@torch.no_grad()
@full_precision
def teacher_measures(teacher: Tensor, center: Tensor, *, temperature: float) -> Measures:
    """Measure how far the teacher's targets are from collapse.

    Args:
        teacher: (..., O) outputs.
        center: (O,).
        temperature: temperature of the teacher.

    Returns:
        teacher_entropy: mean entropy of a target, nats; log O if all targets are flat.
        teacher_kl_uniform: mean KL divergence of a target from the uniform distribution, log O - entropy, nats.
        teacher_diversity: entropy of the mean target minus the mean entropy, nats: 0 if all images get the same target,
            which is either kind of collapse; at most the logarithm of the number of images.
    """
    probabilities = teacher_probabilities(teacher, center, temperature=temperature).flatten(0, -2)
    entropy = _entropy(probabilities).mean()
    return {
        "teacher_entropy": entropy,
        "teacher_kl_uniform": math.log(probabilities.shape[-1]) - entropy,
        "teacher_diversity": _entropy(probabilities.mean(dim=0)) - entropy,
    }


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


@torch.no_grad()
@full_precision
def mask_measures(masks: Tensor) -> Measures:
    """Measure size and overlap of masks (B, K, T, N).

    Returns:
        mask_area: mean mask value, the share of a frame that an object view keeps.
        object_overlap: mean intersection over union of two objects of a frame, 0 for a single object.
    """
    num_objects = masks.shape[1]
    overlap = masks.new_zeros(())
    if num_objects > 1:
        # Indices are created on the device: copying a Python list would synchronize the host.
        pairs = torch.triu_indices(num_objects, num_objects, offset=1, device=masks.device)
        one, other = masks.index_select(1, pairs[0]), masks.index_select(1, pairs[1])
        union = torch.maximum(one, other).sum(dim=-1).clamp(min=torch.finfo(masks.dtype).tiny)
        overlap = (torch.minimum(one, other).sum(dim=-1) / union).mean()
    return {"mask_area": masks.mean(), "object_overlap": overlap}


@torch.no_grad()
@full_precision
def sinkhorn_residual(assignment: Tensor) -> Tensor:
    """Return the mean relative error of column sums, |sum over patches - N / K| / (N / K), of (B, N, K)."""
    num_patches, num_objects = assignment.shape[1:]
    return (assignment.sum(dim=1) * (num_objects / num_patches) - 1).abs().mean()


@torch.no_grad()
@full_precision
def agreement(students: Tensor, rows: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean cosine between the student's outputs and the teacher's for the same frame.

    Args:
        students: (B, V, T, P) input of the student's last layer.
        rows: (O, P) weights of that layer; the outputs students @ rows.T are never materialized.
        teacher: (B, T, O) outputs.
    """
    dots = torch.einsum("btp,bvtp->bvt", F.normalize(teacher, dim=-1) @ rows, students)
    squares = torch.einsum("bvtp,pq,bvtq->bvt", students, rows.mT @ rows, students)
    return (dots * squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt()).mean()
