"""Reference implementation of the step as plain loops: the oracle and the baseline of `dora-ray bench step`.

One forward for each frame and each view, with every block's full attention matrix materialized and kept, all tokens
computed to the end, and the loss one pair of outputs at a time. It shares with the fast path only the networks'
weights, the patch embedding, and the measures, which are not part of the method.
Shapes: B clips, T frames, C channels, N patches, D width, K objects, L local views, G global views, O head outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from dora_ray.method.dora import Network, SlotOutput
from dora_ray.method.losses import Reduction
from dora_ray.method.measures import Measures, mask_measures, sinkhorn_residual, teacher_measures
from dora_ray.method.precision import widen
from dora_ray.method.settings import MethodSettings
from dora_ray.method.tracking import Threshold
from dora_ray.method.vit import embed


@dataclass(frozen=True)
class NaiveFeatures:
    """Features of one frame of all clips.

    Attributes:
        tokens: (B, 1 + N, D) after the final norm.
        queries: for each block, (B, H, 1 + N, D / H).
        keys: for each block, (B, H, 1 + N, D / H).
        attention: for each block, (B, H, 1 + N, 1 + N).
    """

    tokens: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    attention: list[Tensor]


def naive_features(vit: VisionTransformer, images: Tensor) -> NaiveFeatures:
    """Run images (B, C, H, W) through the encoder, keeping queries, keys and attention matrices of every block."""
    return _naive_blocks(vit, embed(vit, images))


def _naive_blocks(vit: VisionTransformer, tokens: Tensor) -> NaiveFeatures:
    queries, keys, matrices = [], [], []
    for block in cast(Iterable[Block], vit.blocks):
        attention = cast(Attention, block.attn)
        qkv = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        matrix = torch.softmax(query @ key.transpose(-2, -1) * attention.head_dim**-0.5, dim=-1)
        mixed = attention.proj((matrix @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.drop_path1(block.ls1(mixed))
        tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        queries.append(query)
        keys.append(key)
        matrices.append(matrix)
    return NaiveFeatures(vit.norm(tokens), queries, keys, matrices)


def naive_sinkhorn(scores: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Return the (N, K) assignment of (N, K) scores by normalizing columns and rows in turn."""
    num_patches, num_objects = scores.shape
    assignment = torch.exp((scores - scores.max()) / epsilon)
    for _ in range(num_iterations):
        assignment = assignment / assignment.sum(dim=0, keepdim=True) / num_objects
        assignment = assignment / assignment.sum(dim=1, keepdim=True) / num_patches
    return assignment * num_patches


def naive_maps(
    frames: list[NaiveFeatures],
    heads: Tensor,
    *,
    block: int,
    normalize_patches: bool,
    num_iterations: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Return attention maps (B, K, T, N) and assignments (B, N, K), clip by clip (equations 1 to 4)."""
    maps, assignments = [], []
    for clip, clip_heads in enumerate(heads):
        attention = frames[0].attention[block][clip, :, 0, 1:]
        query = frames[0].queries[block][clip, :, 1:].transpose(0, 1).flatten(1)
        prototypes = torch.stack([attention[head] @ query for head in clip_heads])
        patches = frames[0].tokens[clip, 1:]
        if normalize_patches:
            patches = patches / patches.norm(dim=1, keepdim=True)
        if num_iterations > 0:
            assignment = naive_sinkhorn(patches @ prototypes.T, epsilon=epsilon, num_iterations=num_iterations)
            prototypes = assignment.T @ patches
            assignments.append(assignment)
        keys = [frame.keys[block][clip, :, 1:].transpose(0, 1).flatten(1) for frame in frames]
        scale = query.shape[1] ** -0.5
        maps.append(torch.stack([torch.softmax(prototypes @ key.T * scale, dim=1) for key in keys], dim=1))
    return torch.stack(maps), torch.stack(assignments) if assignments else torch.empty(0)


def naive_masks(maps: Tensor, threshold: Threshold) -> Tensor:
    """Return masks (B, K, T, N), one object of one frame at a time (equation 5)."""
    masks = torch.zeros_like(maps)
    for i in range(maps.shape[1]):
        for t in range(maps.shape[2]):
            of_frame = maps[:, i, t]
            if threshold == "clip":
                masks[:, i, t] = (of_frame > of_frame.mean(dim=1, keepdim=True)).to(maps.dtype)
            elif threshold == "batch":
                unit = of_frame / of_frame.norm(dim=1, keepdim=True)
                masks[:, i, t] = (unit > unit.mean()).to(maps.dtype)
            else:
                masks[:, i, t] = of_frame / of_frame.max(dim=1, keepdim=True).values
            for clip in range(len(maps)):
                if threshold == "clip" and masks[clip, i, t].sum() == 0:
                    masks[clip, i, t, of_frame[clip].argmax()] = 1.0
    return masks


def naive_random_masks(masks: Tensor, noise: Tensor) -> Tensor:
    """Return the values of masks (B, K, T, N) rearranged, the largest where the noise is largest."""
    shuffled = torch.zeros_like(masks)
    for b, i, t in torch.cartesian_prod(*(torch.arange(size) for size in masks.shape[:3])).tolist():
        places = noise[b, i, t].sort(descending=True).indices
        shuffled[b, i, t, places] = masks[b, i, t].sort(descending=True).values
    return shuffled


def naive_cross_entropy(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the mean over clips of the cross-entropy of outputs (B, O) and target probabilities (B, O)."""
    return -(target * torch.log_softmax(student / temperature, dim=-1)).sum(dim=-1).mean()


def naive_dora_loss(
    objects: list[list[Tensor]],
    locals_: list[list[Tensor]],
    targets: list[Tensor],
    *,
    temperature: float,
    reduction: Reduction,
    object_weight: float,
) -> Tensor:
    """Compute equation 6 on outputs [view][frame] of (B, O) and targets [frame] of (B, O)."""
    counted = locals_[1:] if reduction == "released" else locals_
    total = running = torch.zeros_like(targets[0][0, 0])
    for of_object in objects:
        of_frames = torch.zeros_like(total)
        for t, target in enumerate(targets):
            loss = object_weight * naive_cross_entropy(of_object[t], target, temperature)
            if counted:
                of_locals = [naive_cross_entropy(view[t], target, temperature) for view in counted]
                loss = (loss + torch.stack(of_locals).mean()) / 2
            of_frames = of_frames + loss
        running = (running + of_frames) / len(targets) if reduction == "released" else of_frames / len(targets)
        total = total + running
    return total / len(objects)


def naive_dino_loss(students: list[list[Tensor]], targets: list[list[Tensor]], *, temperature: float) -> Tensor:
    """Compute DINO's loss on outputs [view][frame] and targets [view][frame] of (B, O)."""
    terms = [
        naive_cross_entropy(student[t], target[t], temperature)
        for g, target in enumerate(targets)
        for v, student in enumerate(students)
        if v != g
        for t in range(len(target))
    ]
    return torch.stack(terms).mean()


def reference_slot_forward(
    student: Network,
    teacher: Network,
    center: Tensor,
    settings: MethodSettings,
    *,
    globals_: Tensor,
    locals_: Tensor,
    heads: Tensor,
    noise: Tensor | None,
    object_weight: float,
    masks: Tensor | None = None,
) -> SlotOutput:
    """Compute `slot_forward` with the same arguments and results, one frame and one view at a time."""
    teacher.eval()
    num_globals, num_frames = globals_.shape[1:3]
    dtype, temperature = settings.teacher_dtype, settings.teacher_temperature
    narrow = nullcontext() if dtype is None else torch.autocast(globals_.device.type, dtype)
    with torch.no_grad(), narrow:
        features = [
            [naive_features(teacher.backbone, globals_[:, g, t]) for t in range(num_frames)] for g in range(num_globals)
        ]
        outputs = [[widen(teacher.project(frame.tokens[:, 0])) for frame in view] for view in features]
    with torch.no_grad():
        targets = [[torch.softmax((output - center) / temperature, dim=-1) for output in v] for v in outputs]
    of_locals = _student_outputs(student, locals_)
    stacked = torch.stack([torch.stack(view, dim=1) for view in outputs], dim=1)
    measures = teacher_measures(stacked, center, temperature=temperature)
    if settings.kind == "none":
        of_globals = _student_outputs(student, globals_)
        loss = naive_dino_loss(of_globals + of_locals, targets, temperature=settings.student_temperature)
        students = {"global_agreement": of_globals, "local_agreement": of_locals}
    else:
        with torch.no_grad():
            maps, assignments = naive_maps(
                features[0],
                heads,
                block=settings.block,
                normalize_patches=settings.normalize_patches,
                num_iterations=settings.num_iterations,
                epsilon=settings.epsilon,
            )
            found = naive_masks(maps, settings.threshold)
            if settings.kind == "random" and noise is not None:
                found = naive_random_masks(found, noise)
            masks = found if masks is None else masks
        of_objects = (
            _packed_outputs(student, globals_[:, 0], masks)
            if settings.views == "packed"
            else _student_outputs(student, _object_views(globals_[:, 0], masks))
        )
        loss = naive_dora_loss(
            of_objects,
            of_locals,
            targets[0],
            temperature=settings.student_temperature,
            reduction=settings.reduction,
            object_weight=object_weight,
        )
        students = {"object_agreement": of_objects, "local_agreement": of_locals}
        residual = sinkhorn_residual(assignments) if settings.num_iterations > 0 else loss.new_zeros(())
        measures |= mask_measures(masks) | {"sinkhorn_residual": residual}
    measures |= {"loss": loss.detach(), **_agreements(stacked.mean(dim=1), students)}
    return SlotOutput(loss, stacked.sum(dim=(0, 1, 2), dtype=torch.float32), measures)


def _object_views(frames: Tensor, masks: Tensor) -> Tensor:
    """Return (B, K, T, C, H, W) from frames (B, T, C, H, W) and masks (B, K, T, N) enlarged to pixels."""
    grid = round(masks.shape[-1] ** 0.5)
    pixels = F.interpolate(masks.flatten(0, 2).view(-1, 1, grid, grid), size=frames.shape[-2:], mode="nearest")
    return frames.unsqueeze(1) * pixels.view(*masks.shape[:3], 1, *frames.shape[-2:])


def _student_outputs(student: Network, views: Tensor) -> list[list[Tensor]]:
    """Return outputs [view][frame] of (B, O) on views (B, V, T, C, H, W)."""
    return [
        [student.project(naive_features(student.backbone, frame).tokens[:, 0]) for frame in view.transpose(0, 1)]
        for view in views.transpose(0, 1)
    ]


def _packed_outputs(student: Network, frames: Tensor, masks: Tensor) -> list[list[Tensor]]:
    """Return outputs [object][frame] of (B, O), each object view alone and with its own patches only."""
    views: list[list[Tensor]] = []
    for i in range(masks.shape[1]):
        views.append([])
        for t in range(masks.shape[2]):
            outputs = []
            for clip in range(len(frames)):
                tokens = embed(student.backbone, frames[clip : clip + 1, t])
                kept = torch.cat([tokens[:, :1], tokens[:, 1:][:, masks[clip, i, t] > 0]], dim=1)
                outputs.append(student.project(_naive_blocks(student.backbone, kept).tokens[0, 0]))
            views[-1].append(torch.stack(outputs))
    return views


def naive_agreement(students: list[list[Tensor]], targets: list[Tensor]) -> Tensor:
    """Return the mean cosine of outputs [view][frame] of (B, O) and their frame's teacher [frame] of (B, O)."""
    cosines = [
        torch.cosine_similarity(of_frame.detach(), targets[t], dim=-1)
        for view in students
        for t, of_frame in enumerate(view)
    ]
    return torch.stack(cosines).mean()


def _agreements(targets: Tensor, students: dict[str, list[list[Tensor]]]) -> Measures:
    of_frames = list(targets.unbind(dim=1))
    return {name: naive_agreement(views, of_frames) for name, views in students.items() if views}
