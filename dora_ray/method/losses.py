"""Distillation losses: DoRA's, and DINO's for the baseline without objects.

A cross-entropy H(p, softmax(z / s)) is computed as logsumexp(z / s) - <p, z> / s: one pass over the student's outputs,
and products with the teacher as matrix products, never an array of the outputs for each pair of views.
Shapes: B clips, T frames, K objects, L local views, G global views, V student views, O head outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dora_ray.method.precision import full_precision

Reduction = Literal["mean", "released"]


@torch.no_grad()
@full_precision
def teacher_probabilities(teacher: Tensor, center: Tensor, *, temperature: float) -> Tensor:
    """The teacher's outputs, centered and sharpened, without gradient.

    Args:
        teacher: (..., O) outputs.
        center: (O,) running mean of the outputs.
        temperature: below the student's: sharpening.

    Returns:
        (..., O), summing to 1.
    """
    return torch.softmax((teacher - center) / temperature, dim=-1)


def _cross_entropy(students: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """(B, V, T) cross-entropies of student views (B, V, T, O) with their frame's teacher (B, T, O)."""
    dot = torch.einsum("bto,bvto->bvt", probabilities, students)
    return torch.logsumexp(students / temperature, dim=-1) - dot / temperature


def _released_sum(per_frame: Tensor) -> Tensor:
    """The released code's running sum over objects, which is never reset, of (B, K, T) losses."""
    running, total = per_frame.new_zeros(()), per_frame.new_zeros(())
    num_objects, num_frames = per_frame.shape[1:]
    for of_object in per_frame.mean(dim=0).sum(dim=-1):
        running = (running + of_object) / num_frames
        total = total + running
    return total / num_objects


@full_precision
def dora_loss(
    objects: Tensor,
    locals_: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    reduction: Reduction = "mean",
) -> Tensor:
    """Agreement of object views and local views with the teacher's view of the whole frame (equation 6).

    The naive loop, with H the cross-entropy::

        for each frame t:
            p = softmax((teacher[t] - center) / teacher_temperature)
            loss += (mean over i of H(p, objects[i, t]) + mean over l of H(p, locals_[l, t])) / 2
        loss = loss / T

    "released" reproduces the released code's arithmetic: with S_j the sum over frames of half object j's cross-entropy
    plus half the mean over the local views but the first, f_j = (f_{j-1} + S_j) / T from f_0 = 0, and the loss is the
    mean of f_j.
    Without local views the objects count whole, not half.

    Args:
        objects: (B, K, T, O) student outputs on the object views.
        locals_: (B, L, T, O) student outputs on the local views; L may be 0.
        teacher: (B, T, O) teacher outputs on the global view.
        center: (O,).
        student_temperature: temperature of the student's softmax.
        teacher_temperature: temperature of the teacher's softmax.
        reduction: "mean" or "released".

    Returns:
        The loss in nats, a scalar with gradient to objects and locals_.

    Raises:
        ValueError: for another reduction, or "released" with a single local view, which it would drop.
    """
    if reduction not in ("mean", "released"):
        raise ValueError(f"reduction={reduction!r}: use 'mean' or 'released'")
    if reduction == "released" and locals_.shape[1] == 1:
        raise ValueError("reduction='released' drops the first local view: give 0, or 2 and more, not 1")
    probabilities = teacher_probabilities(teacher, center, temperature=teacher_temperature)
    per_frame = _cross_entropy(objects, probabilities, student_temperature)
    if locals_.shape[1] > 0:
        counted = locals_[:, 1:] if reduction == "released" else locals_
        of_locals = _cross_entropy(counted, probabilities, student_temperature).mean(dim=1, keepdim=True)
        per_frame = (per_frame + of_locals) / 2
    return per_frame.mean() if reduction == "mean" else _released_sum(per_frame)


@full_precision
def dino_loss(
    students: Tensor, teacher: Tensor, center: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Agreement of every student view with every teacher view but itself, frame by frame (DINO, arXiv 2104.14294).

    The naive loop, with H the cross-entropy::

        for each frame t, teacher view g, student view v != g:
            loss += H(softmax((teacher[g, t] - center) / teacher_temperature), students[v, t])
        loss = loss / number of terms

    Args:
        students: (B, V, T, O) student outputs; the first G views are the teacher's views.
        teacher: (B, G, T, O) teacher outputs.
        center: (O,).
        student_temperature: temperature of the student's softmax.
        teacher_temperature: temperature of the teacher's softmax.

    Returns:
        The loss in nats, a scalar with gradient to students.

    Raises:
        ValueError: if there are fewer student views than teacher views, or no two views to compare.
    """
    num_views, num_globals = students.shape[1], teacher.shape[1]
    if num_views < num_globals or num_views < 2:
        raise ValueError(
            f"{num_views} student and {num_globals} teacher views: the student needs 2, the teacher's among them"
        )
    probabilities = teacher_probabilities(teacher, center, temperature=teacher_temperature)
    dot = torch.einsum("bgto,bvto->bvgt", probabilities, students)
    log_sum = torch.logsumexp(students / student_temperature, dim=-1)
    pairs = log_sum.unsqueeze(2) - dot / student_temperature
    other = ~torch.eye(num_views, num_globals, dtype=torch.bool, device=pairs.device)
    return (pairs.mean(dim=(0, 3)) * other).sum() / (num_views * num_globals - num_globals)
