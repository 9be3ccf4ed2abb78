"""Forward of one training slot: objects from the teacher, views for the student, and the loss.

Shapes: B clips, T frames, C channels, N patches, D width, K objects, L local views, G global views, O head outputs,
H heads, P the head's bottleneck.
"""

from __future__ import annotations

import functools
import operator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dora_ray.method.attention import Layout
from dora_ray.method.blocks import cls_of_blocks
from dora_ray.method.head import DINOHead, LastLayerInit
from dora_ray.method.losses import dino_loss, dora_loss
from dora_ray.method.measures import Measures, agreement, mask_measures, teacher_measures
from dora_ray.method.objects import track_objects
from dora_ray.method.parts import part
from dora_ray.method.precision import widen
from dora_ray.method.settings import MethodSettings
from dora_ray.method.tracking import random_masks
from dora_ray.method.vit import (
    TIMM_CLS_STD,
    PositionInterpolation,
    build_vit,
    cls_features,
    kept_patches,
    masked_images,
    tracked_features,
    whole_images,
)


class Network(nn.Module):
    """Encoder with its projection head.

    Attributes:
        backbone: the ViT, kept after training.
        head: DINO's head, discarded after training.
    """

    def __init__(self, backbone: VisionTransformer, head: DINOHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B', C, H, W) to outputs (B', O)."""
        return self.project(cls_features(self.backbone, images))

    def project(self, features: Tensor) -> Tensor:
        """Map features (..., D) to outputs (..., O)."""
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
    position_interpolation: PositionInterpolation = "antialiased",
    cls_token_std: float = TIMM_CLS_STD,
    last_layer_init: LastLayerInit = "normal",
) -> Network:
    """Build a student or a teacher (drop_path 0); see `build_vit` and `DINOHead` for the arguments."""
    backbone = build_vit(
        name=name,
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        image_size=image_size,
        drop_path=drop_path,
        position_interpolation=position_interpolation,
        cls_token_std=cls_token_std,
    )
    head = DINOHead(
        width,
        hidden_width=hidden_width,
        bottleneck_width=bottleneck_width,
        num_layers=num_layers,
        num_outputs=num_outputs,
        last_layer_init=last_layer_init,
    )
    return Network(backbone, head)


@dataclass(frozen=True)
class SlotOutput:
    """Result of one slot.

    Attributes:
        loss: scalar with gradient to the student.
        teacher_sum: (O,) float32 sum of the teacher's outputs over clips, global views and frames, for the center.
        measures: detached scalars. Always loss, teacher_entropy, teacher_kl_uniform and teacher_diversity;
            local_agreement with local views; mask_area, object_overlap, sinkhorn_residual and object_agreement with
            objects; global_agreement for DINO's baseline.
    """

    loss: Tensor
    teacher_sum: Tensor
    measures: Measures


@dataclass(frozen=True)
class Targets:
    """Teacher outputs for a slot.

    Attributes:
        outputs: (B, G, T, O) in float32 or wider.
        masks: (B, K, T, N) masks of the object views; None without objects.
        measures: measures of the objects.
    """

    outputs: Tensor
    masks: Tensor | None
    measures: Measures


@torch.no_grad()
def teacher_forward(
    teacher: Network,
    settings: MethodSettings,
    *,
    globals_: Tensor,
    heads: Tensor,
    noise: Tensor | None,
    object_weight: float,
    masks: Tensor | None,
) -> Targets:
    """Run the teacher on whole frames and discover the objects.

    Takes the arguments of `slot_forward`.

    Raises:
        ValueError: several global views with objects, or kind "random" without noise.
    """
    if settings.kind != "none" and globals_.shape[1] != 1:
        raise ValueError(f"{globals_.shape[1]} global views: objects are tracked in exactly 1")
    teacher.eval()
    dtype = settings.teacher_dtype
    narrow = nullcontext() if dtype is None else torch.autocast(globals_.device.type, dtype)
    if settings.kind == "none" or object_weight == 0.0:
        with narrow, part("teacher"):
            outputs = widen(teacher(globals_.flatten(0, 2)))
        return Targets(torch.unflatten(outputs, 0, globals_.shape[:3]), None, {})
    with narrow, part("teacher"):
        tracked = tracked_features(teacher.backbone, globals_[:, 0], block=settings.block)
        outputs = widen(teacher.project(tracked.cls))
    with part("tracker"):
        objects = track_objects(
            tracked,
            heads,
            normalize_patches=settings.normalize_patches,
            num_iterations=settings.num_iterations,
            epsilon=settings.epsilon,
            threshold=settings.threshold,
        )
        if masks is None:
            masks = objects.masks if settings.kind == "dora" else random_masks(objects.masks, _given(noise))
        measures = mask_measures(masks) | {"sinkhorn_residual": objects.residual}
    return Targets(outputs.unsqueeze(1), masks, measures)


def student_forward(
    student: Network,
    targets: Targets,
    center: Tensor,
    settings: MethodSettings,
    *,
    globals_: Tensor,
    locals_: Tensor,
    object_weight: float,
) -> SlotOutput:
    """Run all student views through the encoder as one batch of sequences, and compute the loss.

    Takes the arguments of `slot_forward`, and the result of `teacher_forward`.
    """
    kind, temperature = settings.kind, settings.teacher_temperature
    temperatures = {"student_temperature": settings.student_temperature, "teacher_temperature": temperature}
    with part("student_forward"):
        large, small = student_bottlenecks(student, globals_, locals_, targets.masks, settings)
        rows = student.head.last_layer.rows()
    with part("loss"):
        if kind == "none":
            both = torch.cat([large, small], dim=1)
            loss = dino_loss(both, targets.outputs, center, rows=rows, **temperatures)
        else:
            of_frame = targets.outputs[:, 0]
            loss = dora_loss(
                large,
                small,
                of_frame,
                center,
                rows=rows,
                reduction=settings.reduction,
                object_weight=object_weight,
                **temperatures,
            )
    with part("measures"):
        large_name = "global_agreement" if kind == "none" else "object_agreement"
        mean_target = targets.outputs.mean(dim=1)
        agreements = {
            name: agreement(features, rows, mean_target)
            for name, features in ((large_name, large), ("local_agreement", small))
            if features.shape[1] > 0
        }
        of_teacher = teacher_measures(targets.outputs, center, temperature=temperature)
        measures = {"loss": loss.detach(), **of_teacher, **targets.measures, **agreements}
    return SlotOutput(loss, targets.outputs.sum(dim=(0, 1, 2), dtype=torch.float32), measures)


def student_bottlenecks(
    student: Network, globals_: Tensor, locals_: Tensor, masks: Tensor | None, settings: MethodSettings
) -> tuple[Tensor, Tensor]:
    """Return the input of the student's last layer for large and for local views: (B, V, T, P) and (B, L, T, P).

    All sequences pass through the encoder together. Large views are the global views for kind "none", otherwise the
    objects; without masks there are none (V = 0).
    """
    num_clips, num_globals, num_frames = globals_.shape[:3]
    num_large = num_globals if settings.kind == "none" else 0 if masks is None else masks.shape[1]
    tokens, layout, places = _sequences(student.backbone, globals_, locals_, masks, settings)
    cls = cls_of_blocks(student.backbone, tokens, layout)
    features = widen(student.head.bottleneck(cls))
    count = num_clips * num_large * num_frames
    large, small = torch.split(features, [count, len(features) - count])
    if places is not None:
        large = F.embedding(places, large)
    shape = (num_frames, features.shape[1])
    return large.view(num_clips, num_large, *shape), small.view(num_clips, locals_.shape[1], *shape)


def _sequences(
    vit: VisionTransformer, globals_: Tensor, locals_: Tensor, masks: Tensor | None, settings: MethodSettings
) -> tuple[Tensor, Layout, Tensor | None]:
    """Return the tokens (P, D) of all views, their layout, and the positions of packed objects, see `kept_patches`."""
    parts, places = [], None
    if settings.kind == "none":
        parts.append(whole_images(vit, globals_.flatten(0, 2)))
    elif masks is not None and settings.views == "packed":
        kept, layout, places = kept_patches(vit, globals_[:, 0], masks)
        parts.append((kept, layout))
    elif masks is not None:
        parts.append(masked_images(vit, globals_[:, 0], masks))
    if locals_.shape[1] > 0:
        parts.append(whole_images(vit, locals_.flatten(0, 2)))
    tokens, layouts = zip(*parts, strict=True)
    return torch.cat(tokens), functools.reduce(operator.add, layouts), places


def slot_forward(
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
    """Run the forward of one slot: a pure function of its arguments, apart from the student's drop path.

    Args:
        student: in training mode.
        teacher: set to evaluation mode, so that it never drops paths.
        center: (O,) running mean of the teacher's outputs.
        settings: settings of the method, equal for every slot.
        globals_: (B, G, T, C, H, W) normalized global views; G = 1 with objects.
        locals_: (B, L, T, C, h, w) normalized local views; L may be 0.
        heads: (B, K) int64 drawn heads; unused with kind "none".
        noise: (B, K, T, N) in [0, 1) that places the masks of kind "random", else None.
        object_weight: weight of `dora_loss`; 0 skips the discovery of objects.
        masks: (B, K, T, N) masks to use instead of the discovered ones, for comparisons.

    Raises:
        ValueError: several global views with objects, or kind "random" without noise.
    """
    targets = teacher_forward(
        teacher, settings, globals_=globals_, heads=heads, noise=noise, object_weight=object_weight, masks=masks
    )
    return student_forward(
        student, targets, center, settings, globals_=globals_, locals_=locals_, object_weight=object_weight
    )


def _given(noise: Tensor | None) -> Tensor:
    if noise is None:
        raise ValueError("noise=None: kind 'random' places its masks by noise of shape (B, K, T, N)")
    return noise
