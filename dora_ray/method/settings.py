"""Settings of the method, equal for every slot of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dora_ray.method.losses import Reduction
from dora_ray.method.tracking import Threshold

Kind = Literal["dora", "none", "random"]
Views = Literal["masked", "packed"]


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings of a slot's forward.

    Attributes:
        kind: "dora" tracked objects, "random" masks of the same area at random patches, "none" DINO without objects.
        views: object views: "masked" whole frames, 0 outside the object (equation 5), or "packed" the object's patches
            alone.
        block: block of the teacher in which objects are discovered, counted from the end.
        normalize_patches: see `track_objects`.
        num_iterations: iterations of Sinkhorn-Knopp.
        epsilon: regularization of Sinkhorn-Knopp.
        threshold: rule of the masks.
        student_temperature: temperature of the student's softmax.
        teacher_temperature: temperature of the teacher's softmax.
        reduction: reduction of `dora_loss`.
        teacher_dtype: autocast type of the teacher's networks; None: the caller's.

    Raises:
        ValueError: unknown kind or views.
    """

    kind: Kind
    views: Views
    block: int
    normalize_patches: bool
    num_iterations: int
    epsilon: float
    threshold: Threshold
    student_temperature: float
    teacher_temperature: float
    reduction: Reduction
    teacher_dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: use 'dora', 'random' or 'none'")
        if self.views not in get_args(Views):
            raise ValueError(f"views={self.views!r}: use 'masked' or 'packed'")
