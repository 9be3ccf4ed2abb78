"""fp8 products: rounding, precision kept elsewhere, and unchanged networks without autocast."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dora_ray.method.fp8 import Fp8Linear, quantize, use_fp8
from dora_ray.method.vit import build_vit, cls_features, tracked_features

# Half the distance of two neighbors with three mantissa bits.
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
    # Below 2^-6, scaled by 448, fp8 numbers are evenly spaced.
    error = (restored - rows).abs()
    assert (error <= ROUNDING * rows.abs() + largest * 2.0**-17).all()
    assert torch.equal(restored[2], rows[2])
    torch.testing.assert_close(restored.abs().amax(dim=1, keepdim=True), largest)
    assert torch.equal(quantize(rows[:1])[0].float(), tokens[:1].float()), "a row depends on its neighbors"


def test_a_layer_is_the_product_of_its_rounded_operands():
    """Autocast must not round the operands of the CPU's emulation."""
    torch.manual_seed(0)
    layer, tokens = nn.Linear(1024, 48, bias=False), torch.randn(2, 5, 1024)
    layer.__class__ = Fp8Linear
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = layer(tokens)
    (narrow, scales), (weights, weight_scales) = quantize(tokens.flatten(0, 1)), quantize(layer.weight)
    product = (narrow.double() * scales) @ (weights.double() * weight_scales).T
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.double(), product.unflatten(0, (2, 5)), rtol=2**-8, atol=1e-6)


def test_operands_match_the_gpu_kernels_layout(monkeypatch):
    """Row-major tokens, column-major weights, float32 scales per row and column, bias in the output's type."""
    plain = F.scaled_mm

    def kernel(tokens, weights, token_scales, kind, weight_scales, other, *, bias, output_dtype):
        assert tokens.is_contiguous()
        assert weights.t().is_contiguous()
        assert token_scales.shape == (10, 1)
        assert weight_scales.shape == (1, 48)
        assert token_scales.dtype == weight_scales.dtype == torch.float32
        assert token_scales.is_contiguous()
        assert weight_scales.is_contiguous()
        assert bias.dtype == output_dtype == torch.bfloat16
        return plain(tokens, weights, token_scales, kind, weight_scales, other, bias=bias, output_dtype=output_dtype)

    monkeypatch.setattr(F, "scaled_mm", kernel)
    layer = nn.Linear(32, 48)
    layer.__class__ = Fp8Linear
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(32, 10).T.unflatten(0, (2, 5))).shape == (2, 5, 48)


@torch.no_grad()
def test_all_frames_are_rounded_alike(vit):
    """The last block computes all tokens of frame 0, but only CLS of the others: their targets must not differ."""
    use_fp8(vit)
    frames = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).expand(1, 3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        cls = tracked_features(vit, frames, block=-2).cls.float()
    torch.testing.assert_close(cls[:, 1:], cls[:, :1].expand(1, 2, -1), rtol=2**-7, atol=2**-7)


def test_without_autocast_nothing_changes(vit):
    """Evaluation and export use the teacher as it is saved."""
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
