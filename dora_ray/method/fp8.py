"""Linear layers in fp8: half the bytes of bf16, and twice its throughput on hardware that supports it.

Only for networks without gradients, such as the teacher. Each row of tokens and each row of weights is scaled by its
own largest element before rounding to float8_e4m3 (four exponent bits, three mantissa bits), so that an outlier token
or channel does not cost the others precision; sums are kept in float32.
Shapes: P tokens, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import ScalingType

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class Fp8Linear(nn.Linear):
    """Linear layer that computes in fp8 under autocast, and in its own precision otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O), in bf16 under autocast."""
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        tokens, token_scales = quantize(input.flatten(0, -2))
        weights, weight_scales = quantize(self.weight)
        # A CPU converts fp8 back to float32 before it multiplies; autocast would round that to bf16.
        with torch.autocast(input.device.type, enabled=False):
            outputs = F.scaled_mm(
                tokens,
                weights.t(),
                token_scales,
                ScalingType.RowWise,
                weight_scales.t(),
                ScalingType.RowWise,
                bias=None if self.bias is None else self.bias.bfloat16(),
                output_dtype=torch.bfloat16,
            )
        return torch.unflatten(outputs, 0, input.shape[:-1])


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (P, I) in fp8, and the float32 scales (P, 1) by which to multiply them."""
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (rows / scales).to(FP8).contiguous(), scales


def use_fp8(vit: VisionTransformer) -> None:
    """Make the linear layers of all blocks but the last compute in fp8; parameters and their names are unchanged.

    The patch embedding stays in bf16, and so do the queries and keys that objects are tracked with, which are computed
    from a layer's weights rather than by the layer. The last block stays in bf16, too: it uses the weights directly for
    all frames but the first, and all frames should be rounded alike. Widths must be multiples of 16.
    """
    for block in vit.blocks[:-1]:
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Fp8Linear
