"""Settings of the network: the encoder and its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dora_ray.config_section import Count, Positive, Section

ARCHITECTURES: dict[str, dict[str, int]] = {
    "vit_tiny_patch16_224": {"width": 192, "depth": 12, "num_heads": 3, "patch_size": 16},
    "vit_small_patch16_224": {"width": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    "vit_small_patch8_224": {"width": 384, "depth": 12, "num_heads": 6, "patch_size": 8},
    "vit_base_patch16_224": {"width": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    "vit_base_patch8_224": {"width": 768, "depth": 12, "num_heads": 12, "patch_size": 8},
    "vit_large_patch16_224": {"width": 1024, "depth": 24, "num_heads": 16, "patch_size": 16},
}


class ModelConfig(Section):
    """The encoder: a timm VisionTransformer."""

    name: str = "vit_small_patch16_224"
    """timm architecture; sets the four sizes below unless they are given (released: ViT-S/16)."""
    init: str | None = None
    """Initial weights: a run, a checkpoint, an exported encoder, a weights file (.pth of the released DoRA or DINO), or
    timm:NAME; default: random weights from the seed."""
    width: Count = 384
    """Embedding width D."""
    depth: Count = 12
    """Number of blocks."""
    num_heads: Count = 6
    """Attention heads per block, from which objects are drawn."""
    patch_size: Count = 16
    """Side of a patch, pixels."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Stochastic depth of the last block of the student, rising linearly from 0 (released)."""
    position_interpolation: Literal["antialiased", "released"] = "antialiased"
    """Resizing of the position embedding to a local view's grid. antialiased: bicubic and antialiased, as in timm;
    released: not antialiased, and with a scale computed from 0.1 patch too many."""
    cls_token_std: Positive = 1e-6
    """Standard deviation of the CLS token's initial values (timm's; released: 0.02)."""

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_the_architecture(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("name", "vit_small_patch16_224")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise ValueError(f"model.name={name!r} is not known; choose from {', '.join(ARCHITECTURES)}")
        return {**ARCHITECTURES[name], **values}

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"model.width={self.width} is not a multiple of model.num_heads={self.num_heads}")
        return self


class HeadConfig(Section):
    """The projection head (released: DINO's)."""

    num_layers: Count = 3
    """Layers of the MLP before the prototypes."""
    hidden_width: Count = 2048
    """Width of the hidden layers."""
    bottleneck_width: Count = 256
    """Width of the normalized bottleneck."""
    num_outputs: Count = 65536
    """Outputs O."""
    last_layer_init: Literal["normal", "uniform"] = "normal"
    """Initial values of the last layer. normal: standard deviation 0.02, rows of norm 0.32 with a bottleneck of 256;
    uniform (released): rows of norm 0.577, which AdamW rotates 1.8 times as slowly."""
