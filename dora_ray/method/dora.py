"""One slot of a training step: objects from the teacher, views for the student, the loss.

Shapes: B clips, T frames, C channels, N patches, D width, K objects, L local views, G global views, O head outputs,
H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dora_ray.method.head import DINOHead
from dora_ray.method.losses import Reduction, dino_loss, dora_loss
from dora_ray.method.measures import Measures, agreement, mask_measures, sinkhorn_residual, teacher_measures
from dora_ray.method.precision import full_precision, widen
from dora_ray.method.tracking import (
    Threshold,
    assigned_sum,
    attention_maps,
    match_patches,
    object_masks,
    object_prototypes,
    random_masks,
)
from dora_ray.method.vit import Tracked, build_vit, cls_features, tracked_features

Kind = Literal["dora", "none", "random"]


class Network(nn.Module):
    """An encoder and its projection head.

    Attributes:
        backbone: the ViT, what is kept after training.
        head: DINO's head, what is thrown away.
    """

    def __init__(self, backbone: VisionTransformer, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """(B', C, H, W) -> (B', O)."""
        return self.project(cls_features(self.backbone, images))

    def project(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        outputs: Tensor = self.head(features)
        return outputs


def build_network(
    *,
    name: str,
    width: int,
    depth: int,
    num_heads: int,
    patch_size: int,
    image_size: int,
    drop_path: float,
    num_layers: int,
    hidden_width: int,
    bottleneck_width: int,
    num_outputs: int,
) -> Network:
    """A student or a teacher (which has a drop_path of 0); see `build_vit` and `DINOHead` for the arguments."""
    backbone = build_vit(
        name=name,
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        image_size=image_size,
        drop_path=drop_path,
    )
    head = DINOHead(
        width,
        hidden_width=hidden_width,
        bottleneck_width=bottleneck_width,
        num_layers=num_layers,
        num_outputs=num_outputs,
    )
    return Network(backbone, head)


@dataclass(frozen=True)
class Objects:
    """The objects of a batch of clips.

    Attributes:
        maps: (B, K, T, N) attention maps, each summing to 1.
        masks: (B, K, T, N) their masks, 0 to 1.
        residual: how unbalanced Sinkhorn-Knopp left the objects; 0 without it.
    """

    maps: Tensor
    masks: Tensor
    residual: Tensor


@dataclass(frozen=True)
class SlotOutput:
    """What one slot adds to a step.

    Attributes:
        loss: scalar with gradient to the student.
        teacher_sum: (O,) float32 sum of the teacher's outputs over clips, global views and frames, for the center.
        num_teacher: number of outputs in that sum.
        measures: detached scalars. Always loss, teacher_entropy, teacher_kl_uniform and teacher_diversity;
            local_agreement with local views; mask_area, object_overlap, sinkhorn_residual and object_agreement with
            objects; global_agreement without.
    """

    loss: Tensor
    teacher_sum: Tensor
    num_teacher: int
    measures: Measures


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
        tracked: the teacher's features.
        heads: (B, K) int64 attention heads, each the seed of an object; distinct within a clip.
        normalize_patches: L2-normalize the patch tokens in the cost and in the prototypes.
        num_iterations: of Sinkhorn-Knopp; 0 is naive cross-attention.
        epsilon: of Sinkhorn-Knopp.
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


def object_views(frames: Tensor, masks: Tensor) -> Tensor:
    """Every frame once for each object, everything but the object being 0, which is the mean color (equation 5).

    Args:
        frames: (B, T, C, H, W) normalized frames.
        masks: (B, K, T, N) with the patches of a square grid row by row.

    Returns:
        (B, K, T, C, H, W).
    """
    grid = round(masks.shape[-1] ** 0.5)
    # Patches get their own dimensions, so that masks are broadcast and never blown up to pixels.
    cells = torch.unflatten(torch.unflatten(frames, -1, (grid, -1)), -3, (grid, -1)).unsqueeze(1)
    cell_masks = torch.unflatten(masks.to(frames.dtype), -1, (grid, grid))[:, :, :, None, :, None, :, None]
    return torch.mul(cells, cell_masks).flatten(-2).flatten(-3, -2)


def slot_forward(
    student: Network,
    teacher: Network,
    center: Tensor,
    *,
    globals_: Tensor,
    locals_: Tensor,
    heads: Tensor,
    noise: Tensor | None,
    kind: Kind,
    block: int,
    normalize_patches: bool,
    num_iterations: int,
    epsilon: float,
    threshold: Threshold,
    student_temperature: float,
    teacher_temperature: float,
    reduction: Reduction,
) -> SlotOutput:
    """The forward of one slot: a pure function of its arguments but for the student's drop path.

    The student sees all object views in one batch and all local views in another; the head sees both at once.

    Args:
        student: in training mode.
        teacher: is put in evaluation mode: it never drops paths.
        center: (O,) running mean of the teacher's outputs.
        globals_: (B, G, T, C, H, W) normalized global views; one where there are objects.
        locals_: (B, L, T, C, h, w) normalized local views; L may be 0.
        heads: (B, K) int64 drawn heads; unused with kind "none".
        noise: (B, K, T, N) in [0, 1) that places the masks of kind "random", else None.
        kind: "dora" tracked objects, "random" masks of the same area anywhere, "none" DINO without objects.
        block: block of the teacher that objects are discovered in, from the end.
        normalize_patches: see `track_objects`.
        num_iterations: of Sinkhorn-Knopp.
        epsilon: of Sinkhorn-Knopp.
        threshold: rule of the masks.
        student_temperature: temperature of the student's softmax.
        teacher_temperature: temperature of the teacher's softmax.
        reduction: of `dora_loss`.

    Raises:
        ValueError: for another kind, several global views beside objects, or kind "random" without noise.
    """
    temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
    teacher.eval()
    if kind == "none":
        return _baseline_slot(student, teacher, center, globals_, locals_, temperatures)
    if kind not in ("dora", "random"):
        raise ValueError(f"kind={kind!r}: use 'dora', 'random' or 'none'")
    if globals_.shape[1] != 1:
        raise ValueError(f"{globals_.shape[1]} global views: objects are tracked in exactly 1")
    frames = globals_[:, 0]
    with torch.no_grad():
        tracked = tracked_features(teacher.backbone, frames, block=block)
        targets = widen(teacher.project(tracked.cls))
        objects = track_objects(
            tracked,
            heads,
            normalize_patches=normalize_patches,
            num_iterations=num_iterations,
            epsilon=epsilon,
            threshold=threshold,
        )
        masks = objects.masks if kind == "dora" else random_masks(objects.masks, _given(noise))
    of_objects, of_locals = _student_outputs(student, object_views(frames, masks), locals_)
    loss = dora_loss(of_objects, of_locals, targets, center, reduction=reduction, **temperatures)
    measures = {
        "loss": loss.detach(),
        **teacher_measures(targets, center, temperature=teacher_temperature),
        **mask_measures(masks),
        "sinkhorn_residual": objects.residual,
        **_agreements(targets, object_agreement=of_objects, local_agreement=of_locals),
    }
    return SlotOutput(loss, targets.sum(dim=(0, 1), dtype=torch.float32), targets.shape[:2].numel(), measures)


def _baseline_slot(
    student: Network,
    teacher: Network,
    center: Tensor,
    globals_: Tensor,
    locals_: Tensor,
    temperatures: dict[str, float],
) -> SlotOutput:
    """DINO on the same clips: the student's views are the global views and the local views."""
    with torch.no_grad():
        features = cls_features(teacher.backbone, globals_.flatten(0, 2))
        targets = torch.unflatten(widen(teacher.project(features)), 0, globals_.shape[:3])
    of_globals, of_locals = _student_outputs(student, globals_, locals_)
    loss = dino_loss(torch.cat([of_globals, of_locals], dim=1), targets, center, **temperatures)
    measures = {
        "loss": loss.detach(),
        **teacher_measures(targets, center, temperature=temperatures["teacher_temperature"]),
        **_agreements(targets.mean(dim=1), global_agreement=of_globals, local_agreement=of_locals),
    }
    return SlotOutput(loss, targets.sum(dim=(0, 1, 2), dtype=torch.float32), targets.shape[:3].numel(), measures)


def _student_outputs(student: Network, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, V, T, O) of views (B, V, T, C, H, W) of two sizes; the smaller ones may be missing (V of 0)."""
    views = [view for view in (large, small) if view.shape[1] > 0]
    features = [cls_features(student.backbone, view.flatten(0, 2)) for view in views]
    outputs = torch.split(student.project(torch.cat(features)), [len(feature) for feature in features])
    shaped = [torch.unflatten(output, 0, view.shape[:3]) for output, view in zip(outputs, views, strict=True)]
    return shaped[0], shaped[1] if len(shaped) == 2 else shaped[0][:, :0]


def _agreements(targets: Tensor, **students: Tensor) -> Measures:
    """Mean cosine with the targets (B, T, O), for each named kind of views that there are any of."""
    return {name: agreement(outputs, targets) for name, outputs in students.items() if outputs.shape[1] > 0}


def _given(noise: Tensor | None) -> Tensor:
    if noise is None:
        raise ValueError("noise=None: kind 'random' places its masks by noise of shape (B, K, T, N)")
    return noise
