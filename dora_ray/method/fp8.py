"""An encoder whose linear layers multiply in eight bits: half the bytes of bf16, twice its rate on chips that have it.

Only for networks without gradients, as the teacher is. Each row of tokens and each row of weights is scaled by its own
largest element before it is rounded to float8_e4m3 (four bits of exponent, three of mantissa), so that neither an
outlying token nor an outlying channel costs the others their bits; sums are kept in float32.
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
    """A linear layer that computes in fp8 where autocast asks for less than float32, and as ever where it does not."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O), in bf16 under autocast."""
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        tokens, token_scales = quantize(input.flatten(0, -2))
        weights, weight_scales = quantize(self.weight)
        # A CPU multiplies what it has converted back to float32, which autocast would round to bf16.
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
    """Rows (P, I) in fp8, and the float32 scales (P, 1) to multiply them with."""
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (rows / scales).to(FP8).contiguous(), scales


def use_fp8(vit: VisionTransformer) -> None:
    """Make the linear layers of all blocks but the last compute in fp8; parameters and their names stay.

    The patch embedding stays in bf16, and so do the queries and keys that objects are tracked with, which are taken
    from a layer's weights rather than from the layer. The last block does so for every frame but the first, all frames
    of which should be rounded alike. Widths have to be multiples of 16.
    """
    for block in vit.blocks[:-1]:
        for layer in block.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Fp8Linear
