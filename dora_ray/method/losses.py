"""Distillation losses: DoRA's, and DINO's for the baseline without objects.

A cross-entropy H(p, softmax(z / s)) is computed as logsumexp(z / s) - <p, z> / s. The student's outputs are a product z
= W f with the head's last layer, so <p, z> = <W^T p, f> needs no outputs, and the logsumexp needs them for only a few
views at a time. With 65,536 outputs, they would be the largest tensor in memory.
Shapes: B clips, T frames, K objects, L local views, G global views, V student views, O head outputs, P the head's
bottleneck.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dora_ray.method.precision import full_precision

Reduction = Literal["mean", "released"]

# Number of outputs materialized at a time: 64 MiB in float32.
CHUNK_OUTPUTS = 2**24


@torch.no_grad()
@full_precision
def teacher_probabilities(teacher: Tensor, center: Tensor, *, temperature: float) -> Tensor:
    """Return the teacher's centered and sharpened probabilities, without gradient.

    Args:
        teacher: (..., O) outputs.
        center: (O,) running mean of the outputs.
        temperature: below the student's, which sharpens.

    Returns:
        (..., O), summing to 1.
    """
    return torch.softmax((teacher - center) / temperature, dim=-1)


def log_sums(students: Tensor, rows: Tensor | None, *, temperature: float) -> Tensor:
    """Return logsumexp of the student's outputs divided by the temperature, (...).

    Args:
        students: (..., P) input of the head's last layer; with rows=None, the outputs (..., O) themselves.
        rows: (O, P) weights of that layer. Its outputs are materialized in chunks, and recomputed in the backward.
        temperature: temperature of the student.
    """
    scaled = students / temperature
    if rows is None:
        return torch.logsumexp(scaled, dim=-1)
    sums: Tensor = _LogSums.apply(scaled.flatten(0, -2), rows)
    return sums.view(students.shape[:-1])


class _LogSums(torch.autograd.Function):
    """Logsumexp (n,) of the outputs features @ rows.T, from features (n, P) and rows (O, P).

    Its gradient with respect to the outputs is their softmax, so the backward recomputes them.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(features, rows)
        return torch.cat([torch.logsumexp(chunk @ rows.mT, dim=-1) for chunk in _chunks(features, rows)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features, rows = ctx.saved_tensors
        return _log_sum_gradients(features, rows, gradient)


@full_precision
def _log_sum_gradients(features: Tensor, rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of features (n, P) and rows (O, P), given that of the sums (n,)."""
    means, of_rows = torch.empty_like(features), torch.zeros_like(rows)
    weighted = features * gradient.unsqueeze(1)
    for chunk, of_chunk, mean in zip(*(_chunks(each, rows) for each in (features, weighted, means)), strict=True):
        probabilities = torch.softmax(chunk @ rows.mT, dim=-1)
        torch.mm(probabilities, rows, out=mean)
        of_rows.addmm_(probabilities.mT, of_chunk)
    return means * gradient.unsqueeze(1), of_rows


def _chunks(features: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(features, max(1, CHUNK_OUTPUTS // len(rows)))


def _cross_entropy(students: Tensor, rows: Tensor | None, probabilities: Tensor, temperature: float) -> Tensor:
    """Return (B, V, T) cross-entropies of student views (B, V, T, P) with their frame's teacher (B, T, O)."""
    expected = probabilities if rows is None else probabilities @ rows
    dots = torch.einsum("btp,bvtp->bvt", expected, students)
    return log_sums(students, rows, temperature=temperature) - dots / temperature


def _released_sum(per_frame: Tensor) -> Tensor:
    """Return the released code's running sum over objects, which is never reset, of (B, K, T) losses."""
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
    rows: Tensor | None = None,
    student_temperature: float,
    teacher_temperature: float,
    reduction: Reduction = "mean",
    object_weight: float = 1.0,
) -> Tensor:
    """Compute the agreement of object and local views with the teacher's view of the whole frame (equation 6).

    The naive loop, with H the cross-entropy::

            for each frame t:
                p = softmax((teacher[t] - center) / teacher_temperature)
                loss += (mean over i of H(p, objects[i, t]) + mean over l of H(p, locals_[l, t])) / 2
            loss = loss / T

    "released" reproduces the released code's arithmetic: with S_j the sum over frames of half object j's cross-entropy
    plus half the mean over all local views but the first, f_j = (f_{j-1} + S_j) / T from f_0 = 0, and the loss is the
    mean of f_j. Without local views, objects count fully rather than half. Without objects, local views still count
    half.

    Args:
        objects: (B, K, T, P) input of the student's last layer for the object views; with rows=None, its outputs
            (B, K, T, O). K may be 0.
        locals_: (B, L, T, P) or (B, L, T, O) for the local views; L may be 0.
        teacher: (B, T, O) teacher outputs on the global view.
        center: (O,).
        rows: (O, P) the student's last layer.
        student_temperature: temperature of the student's softmax.
        teacher_temperature: temperature of the teacher's softmax.
        reduction: "mean" or "released".
        object_weight: weight of the objects' cross-entropy.

    Returns:
        The loss in nats, a scalar with gradient to objects, locals_ and rows.

    Raises:
        ValueError: unknown reduction, or "released" with a single local view, which it would drop, or without objects,
            over which it sums.
    """
    if reduction not in ("mean", "released"):
        raise ValueError(f"reduction={reduction!r}: use 'mean' or 'released'")
    if reduction == "released" and (locals_.shape[1] == 1 or objects.shape[1] == 0):
        raise ValueError(
            "reduction='released' drops the first local view and sums over objects: give 0, or 2 and more local views, "
            f"not {locals_.shape[1]}, and 1 object or more, not {objects.shape[1]}"
        )
    probabilities = teacher_probabilities(teacher, center, temperature=teacher_temperature)
    # One product of all views with the last layer.
    views = torch.split(
        _cross_entropy(torch.cat([objects, locals_], dim=1), rows, probabilities, student_temperature),
        [objects.shape[1], locals_.shape[1]],
        dim=1,
    )
    per_frame = object_weight * views[0]
    if locals_.shape[1] > 0:
        counted = views[1][:, 1:] if reduction == "released" else views[1]
        of_locals = counted.mean(dim=1, keepdim=True)
        per_frame = (per_frame + of_locals) / 2 if objects.shape[1] > 0 else of_locals / 2
    return per_frame.mean() if reduction == "mean" else _released_sum(per_frame)


@full_precision
def dino_loss(
    students: Tensor,
    teacher: Tensor,
    center: Tensor,
    *,
    rows: Tensor | None = None,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Compute the agreement of every student view with every other teacher view, per frame (DINO, arXiv 2104.14294).

    The naive loop, with H the cross-entropy::

            for each frame t, teacher view g, student view v != g:
                loss += H(softmax((teacher[g, t] - center) / teacher_temperature), students[v, t])
            loss = loss / number of terms

    Args:
        students: (B, V, T, P) input of the student's last layer; with rows=None, its outputs (B, V, T, O). The first G
            views are the teacher's views.
        teacher: (B, G, T, O) teacher outputs.
        center: (O,).
        rows: (O, P) the student's last layer.
        student_temperature: temperature of the student's softmax.
        teacher_temperature: temperature of the teacher's softmax.

    Returns:
        The loss in nats, a scalar with gradient to students and rows.

    Raises:
        ValueError: fewer student views than teacher views, or no two views to compare.
    """
    num_views, num_globals = students.shape[1], teacher.shape[1]
    if num_views < num_globals or num_views < 2:
        raise ValueError(
            f"{num_views} student and {num_globals} teacher views: the student needs 2, the teacher's among them"
        )
    probabilities = teacher_probabilities(teacher, center, temperature=teacher_temperature)
    expected = probabilities if rows is None else probabilities @ rows
    dots = torch.einsum("bgtp,bvtp->bvgt", expected, students)
    pairs = log_sums(students, rows, temperature=student_temperature).unsqueeze(2) - dots / student_temperature
    other = ~torch.eye(num_views, num_globals, dtype=torch.bool, device=pairs.device)
    return (pairs.mean(dim=(0, 3)) * other).sum() / (num_views * num_globals - num_globals)
