"""Products in eight bits: what is rounded, what is not, and that a network is itself again without autocast."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dora_ray.method.fp8 import Fp8Linear, quantize, use_fp8
from dora_ray.method.vit import build_vit, cls_features, tracked_features

# Half the distance of two neighbors, of three bits of mantissa.
ROUNDING = 2.0**-4


@pytest.fixture
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return build_vit(
        name="vit_tiny_patch16_224", width=48, depth=3, num_heads=3, patch_size=8, image_size=32, drop_path=0.0
    ).eval()


def test_every_row_keeps_its_own_range():
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rows[1] *= 1e4
    rows[2] = 0
    rows[3] *= 1e-6
    tokens, scales = quantize(rows)
    restored = tokens.float() * scales
    largest = rows.abs().amax(dim=1, keepdim=True)
    # Below 2^-6 of 448 the numbers of fp8 are evenly spaced.
    error = (restored - rows).abs()
    assert (error <= ROUNDING * rows.abs() + largest * 2.0**-17).all()
    assert torch.equal(restored[2], rows[2])
    torch.testing.assert_close(restored.abs().amax(dim=1, keepdim=True), largest)
    assert torch.equal(quantize(rows[:1])[0].float(), tokens[:1].float()), "a row depends on its neighbors"


def test_a_layer_is_the_product_of_its_rounded_operands():
    torch.manual_seed(0)
    layer, tokens = nn.Linear(32, 48), torch.randn(2, 5, 32)
    layer.__class__ = Fp8Linear
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = layer(tokens)
    (narrow, scales), (weights, weight_scales) = quantize(tokens.flatten(0, 1)), quantize(layer.weight)
    product = (narrow.float() * scales) @ (weights.float() * weight_scales).T
    expected = (product + layer.bias.bfloat16().float()).unflatten(0, (2, 5))
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), expected.detach(), rtol=2**-7, atol=2**-8)


def test_without_autocast_nothing_changes(vit):
    """Evaluation and export see the teacher as it is saved."""
    images, same = torch.randn(2, 3, 32, 32), deepcopy(vit)
    use_fp8(same)
    assert same.state_dict().keys() == vit.state_dict().keys()
    assert torch.equal(cls_features(same, images), cls_features(vit, images))


@torch.no_grad()
def test_features_stay_near_those_of_float32(vit):
    frames = torch.randn(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    exact, narrow = tracked_features(vit, frames, block=-2), deepcopy(vit)
    use_fp8(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        half, eighth = (tracked_features(net, frames, block=-2) for net in (vit, narrow))

    def error(features) -> float:
        return float((features.cls.float() - exact.cls).norm() / exact.cls.norm())

    assert error(half) < error(eighth) < 0.15, "fp8 was not used, or is far off"
