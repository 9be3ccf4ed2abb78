"""The method's equations as loops over numbers in float64: slow, obvious, and written without looking at the package.

Shapes: B clips, T frames, N patches, D width, K objects, L local views, G global views, V student views, O outputs,
H heads.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(values: Array) -> Array:
    """Apply softmax to a vector."""
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def sinkhorn_knopp(scores: Array, epsilon: float, num_iterations: int) -> Array:
    """Balance (N, K): normalize columns to 1/K, then rows to 1/N, in turn; finally multiply by N."""
    num_patches, num_objects = scores.shape
    kernel = np.exp((scores - scores.max()) / epsilon)
    for _ in range(num_iterations):
        for k in range(num_objects):
            kernel[:, k] *= (1 / num_objects) / kernel[:, k].sum()
        for n in range(num_patches):
            kernel[n] *= (1 / num_patches) / kernel[n].sum()
    return kernel * num_patches


def object_prototypes(cls_attention: Array, query: Array) -> Array:
    """(B, K, N), (B, N, D) -> (B, K, D)."""
    prototypes = np.zeros((*cls_attention.shape[:2], query.shape[2]))
    for b, k, n in np.ndindex(*cls_attention.shape):
        prototypes[b, k] += cls_attention[b, k, n] * query[b, n]
    return prototypes


def refine_prototypes(prototypes: Array, patches: Array, epsilon: float, num_iterations: int) -> Array:
    """(B, K, D), (B, N, D) -> (B, K, D)."""
    refined = np.zeros_like(prototypes)
    for b in range(len(prototypes)):
        cost = -patches[b] @ prototypes[b].T
        assignment = sinkhorn_knopp(-cost, epsilon, num_iterations)
        for n, k in np.ndindex(*assignment.shape):
            refined[b, k] += assignment[n, k] * patches[b, n]
    return refined


def attention_maps(prototypes: Array, key: Array) -> Array:
    """(B, K, D), (B, T, N, D) -> (B, K, T, N)."""
    num_clips, num_frames, num_patches, width = key.shape
    maps = np.zeros((num_clips, prototypes.shape[1], num_frames, num_patches))
    for b, k, t in np.ndindex(*maps.shape[:3]):
        maps[b, k, t] = softmax(key[b, t] @ prototypes[b, k] / math.sqrt(width))
    return maps


def object_masks(maps: Array, threshold: str) -> Array:
    """(B, K, T, N) -> (B, K, T, N)."""
    masks = np.zeros_like(maps)
    for b, k, t, n in np.ndindex(*maps.shape):
        if threshold == "clip":
            frame = maps[b, k, t]
            masks[b, k, t, n] = frame[n] > frame.mean() or (frame.max() <= frame.mean() and n == frame.argmax())
        elif threshold == "batch":
            units = [frame / math.sqrt((frame**2).sum()) for frame in maps[:, k, t]]
            masks[b, k, t, n] = units[b][n] > np.mean(units)
        else:
            masks[b, k, t, n] = maps[b, k, t, n] / maps[b, k, t].max()
    return masks


def cross_entropy(
    student: Array, teacher: Array, center: Array, student_temperature: float, teacher_temperature: float
):
    """Return the cross-entropy H(teacher, student) of two output vectors (O,), nats."""
    target = softmax((teacher - center) / teacher_temperature)
    return -sum(p * math.log(q) for p, q in zip(target, softmax(student / student_temperature), strict=True))


def dora_loss(
    objects: Array, locals_: Array, teacher: Array, center: Array, temperatures: tuple[float, float]
) -> float:
    """Average half objects and half locals over clips and frames: (B, K, T, O), (B, L, T, O), (B, T, O), (O,)."""
    losses = []
    for b, t in np.ndindex(*teacher.shape[:2]):
        of_objects = [cross_entropy(view, teacher[b, t], center, *temperatures) for view in objects[b, :, t]]
        of_locals = [cross_entropy(view, teacher[b, t], center, *temperatures) for view in locals_[b, :, t]]
        halves = [np.mean(of_objects)] + ([np.mean(of_locals)] if of_locals else [])
        losses.append(np.mean(halves))
    return float(np.mean(losses))


def released_loss(
    objects: Array, locals_: Array, teacher: Array, center: Array, temperatures: tuple[float, float]
) -> float:
    """Compute the released code's sum: divided by T, but not reset, after each object; local 0 is skipped."""
    num_clips, num_objects, num_frames = objects.shape[:3]
    running, collected = 0.0, []
    for j in range(num_objects):
        for t in range(num_frames):

            def of(view: Array, t: int = t) -> float:
                return float(
                    np.mean([cross_entropy(view[b, t], teacher[b, t], center, *temperatures) for b in range(num_clips)])
                )

            local = [of(locals_[:, v]) for v in range(1, locals_.shape[1])]
            running += 0.5 * (of(objects[:, j]) + sum(local) / len(local))
        running /= num_frames
        collected.append(running)
    return sum(collected) / num_objects


def dino_loss(students: Array, teacher: Array, center: Array, temperatures: tuple[float, float]) -> float:
    """Average over clips, frames and pairs of different views: (B, V, T, O), (B, G, T, O), (O,) -> scalar."""
    terms = [
        cross_entropy(students[b, v, t], teacher[b, g, t], center, *temperatures)
        for b, v, t in np.ndindex(*students.shape[:3])
        for g in range(teacher.shape[1])
        if v != g
    ]
    return float(np.mean(terms))


def linear(inputs: Array, weight: Array, bias: Array) -> Array:
    """Apply a linear layer to each row."""
    return inputs @ weight.T + bias


def layer_norm(rows: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Normalize each row."""
    centered = rows - rows.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon) * weight + bias


def cls_attention(tokens: Array, weights: dict[str, Array], num_heads: int) -> tuple[Array, Array, Array]:
    """Return queries (N, D), keys (N, D) and CLS attention (H, N) of a block's input (1 + N, D), by head (equation 1).

    `weights` are the block's state: norm1.weight, norm1.bias, attn.qkv.weight, attn.qkv.bias.
    """
    width = tokens.shape[1]
    per_head = width // num_heads
    normalized = layer_norm(tokens, weights["norm1.weight"], weights["norm1.bias"], 1e-6)
    qkv = linear(normalized, weights["attn.qkv.weight"], weights["attn.qkv.bias"])
    query, key = qkv[:, :width], qkv[:, width : 2 * width]
    rows = []
    for head in range(num_heads):
        part = slice(head * per_head, (head + 1) * per_head)
        rows.append(softmax(key[:, part] @ query[0, part] / math.sqrt(per_head))[1:])
    return query[1:], key[1:], np.stack(rows)


def cosine_schedule(start: float, end: float, num_steps: int, warmup_steps: int, warmup_start: float) -> Array:
    """Return all values of a run."""
    warmup = np.linspace(warmup_start, start, warmup_steps)
    count = num_steps - warmup_steps
    rest = [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / count)) for i in range(count)]
    return np.concatenate([warmup, rest])
