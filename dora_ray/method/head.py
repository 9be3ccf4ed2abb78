"""Projection head of DINO (arXiv 2104.14294), which DoRA keeps.

Shapes: D width of the encoder, P bottleneck, O outputs.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LastLayerInit = Literal["normal", "uniform"]


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are unit directions times a learned gain.

    Attributes:
        direction: (O, P), of any length.
        gain: (O, 1), length of each row, initially 1.

    Args:
        in_width: P.
        num_outputs: O.
        init: initialization of the directions: "normal" with standard deviation 0.02, so rows have length 0.02 sqrt(P)
            (0.32 for P = 256), or "uniform" in +-1 / sqrt(P), torch's default for linear layers, so rows have length
            1 / sqrt(3) = 0.577. Only directions matter, so the length sets how fast an optimizer turns them.
    """

    def __init__(self, in_width: int, num_outputs: int, *, init: LastLayerInit = "normal") -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(num_outputs, in_width))
        self.gain = nn.Parameter(torch.ones(num_outputs, 1))
        if init == "normal":
            nn.init.trunc_normal_(self.direction, std=0.02)
        else:
            nn.init.uniform_(self.direction, -(in_width**-0.5), in_width**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., P) to (..., O)."""
        return F.linear(features, self.rows())

    def rows(self) -> Tensor:
        """Return the layer as one matrix, (O, P)."""
        return self.gain * F.normalize(self.direction, dim=1)


class DINOHead(nn.Module):
    """MLP to an L2-normalized bottleneck, followed by a weight-normalized prototype for each output.

    Args:
        in_width: width D of the features.
        hidden_width: width of the hidden layers.
        bottleneck_width: width P before the last layer.
        num_layers: linear layers of the MLP, at least 1; the last one outputs the bottleneck.
        num_outputs: outputs O.
        last_layer_init: see `WeightNormLinear`.
    """

    def __init__(
        self,
        in_width: int,
        *,
        hidden_width: int,
        bottleneck_width: int,
        num_layers: int,
        num_outputs: int,
        last_layer_init: LastLayerInit = "normal",
    ) -> None:
        super().__init__()
        widths = [in_width, *[hidden_width] * (num_layers - 1), bottleneck_width]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = WeightNormLinear(bottleneck_width, num_outputs, init=last_layer_init)
        self.mlp.apply(_initialize)

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., D) to (..., O)."""
        outputs: Tensor = self.last_layer(self.bottleneck(features))
        return outputs

    def bottleneck(self, features: Tensor) -> Tensor:
        """Map (..., D) to (..., P) of unit length: all but the last layer."""
        return F.normalize(self.mlp(features), dim=-1)


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
