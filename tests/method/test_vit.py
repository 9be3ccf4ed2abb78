from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dora_ray.errors import ConfigError
from dora_ray.method.vit import build_vit, cls_features, embed, image_features, tracked_features
from tests.method.networks import NUM_HEADS, build_small
from tests.oracles import method as oracle

SIZES = {"width": 24, "depth": 3, "num_heads": 6, "patch_size": 8, "image_size": 32, "drop_path": 0.0}


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return build_small(0).backbone.eval()


def draw_frames(num_frames: int = 3, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, num_frames, 3, size, size, generator=generator, dtype=torch.float64)


def block_inputs(vit: VisionTransformer, images: torch.Tensor, block: int) -> torch.Tensor:
    """Return the tokens (B', 1 + N, D) entering a block, captured during timm's own forward."""
    caught: list[torch.Tensor] = []
    handle = vit.blocks[block].register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        vit.forward_features(images)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize(("height", "width", "tolerance"), [(32, 32, 1e-10), (16, 16, 1e-5), (48, 24, 1e-5)])
def test_cls_features_equal_timms(vit, height, width, tolerance):
    """For image sizes other than the model's, timm interpolates the position embedding in float32."""
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = cls_features(vit, images), vit(images)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    features = image_features(vit, images)
    assert torch.equal(features.cls, theirs)
    assert torch.equal(features.patches, vit.forward_features(images)[:, 1:])


@pytest.mark.parametrize(("size", "tolerance"), [(32, 1e-9), (16, 1e-5)])
def test_gradients_of_cls_features_equal_timms(vit, size, tolerance):
    images = draw_frames(size=size).flatten(0, 1)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(output.sin().sum(), list(vit.parameters())))

    ours, theirs = gradients(cls_features(vit, images)), gradients(vit(images))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def test_training_follows_an_evaluation_in_inference_mode(vit):
    """Tensors cached between forwards must be usable in a backward."""
    images = draw_frames(size=24).flatten(0, 1)
    with torch.inference_mode():
        cls_features(vit, images)
    assert torch.autograd.grad(cls_features(vit, images).sum(), vit.pos_embed)[0].abs().max() > 0


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("block", [-1, -2, -3])
def test_tracked_features_equal_the_equation(vit, block, num_frames):
    frames = draw_frames(num_frames)
    tracked = tracked_features(vit, frames, block=block)
    weights = {name: value.numpy() for name, value in vit.blocks[block].state_dict().items()}
    for b, t in np.ndindex(2, num_frames):
        tokens = block_inputs(vit, frames[b, t][None], block)[0].numpy()
        query, key, attention = oracle.cls_attention(tokens, weights, NUM_HEADS)
        np.testing.assert_allclose(tracked.key[b, t].detach(), key, rtol=1e-9, atol=1e-12)
        if t == 0:
            np.testing.assert_allclose(tracked.query0[b].detach(), query, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(tracked.cls_attention0[b].detach(), attention, rtol=1e-9, atol=1e-12)
    features = image_features(vit, frames.flatten(0, 1))
    torch.testing.assert_close(tracked.cls.flatten(0, 1), features.cls, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tracked.patches0, features.patches.unflatten(0, (2, -1))[:, 0], rtol=1e-10, atol=1e-12)


def test_attention_leaves_a_share_to_cls_itself(vit):
    attention = tracked_features(vit, draw_frames(), block=-1).cls_attention0.sum(dim=-1)
    assert bool(((attention > 0) & (attention < 1)).all())


@pytest.mark.parametrize("block", [0, 1, -4])
def test_blocks_count_from_the_end(vit, block):
    with pytest.raises(ValueError, match="use -3 to -1"):
        tracked_features(vit, draw_frames(), block=block)


def test_drop_path_is_drawn_from_the_seeded_generator():
    vit = build_small(0, drop_path=0.5).backbone.train()
    images = draw_frames().flatten(0, 1)

    def seeded(forward, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return forward(images)

    ours = seeded(lambda batch: cls_features(vit, batch), 1)
    torch.testing.assert_close(ours, seeded(vit, 1), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours, seeded(lambda batch: cls_features(vit, batch), 2))


def test_a_vit_with_other_parts_is_read_too():
    """Use normalized queries and keys, and layer scale, as some timm models do."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 6, "num_classes": 0}
    vit = VisionTransformer(**sizes, qk_norm=True, init_values=0.5, dynamic_img_size=True).double()
    images = draw_frames().flatten(0, 1)
    torch.testing.assert_close(cls_features(vit, images), vit(images), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_teeny"}, "no model 'vit_teeny'"),
        ({"num_heads": 5}, "multiple of 5"),
        ({"name": "vit_base_patch16_rpn_224"}, "not a plain ViT"),
        ({"name": "vit_small_patch14_reg4_dinov2", "patch_size": 8}, "not a plain ViT"),
    ],
)
def test_a_vit_that_is_not_plain_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_vit(**({"name": "vit_tiny_patch16_224"} | SIZES | changes))


def keys_cubic(distance: float, a: float) -> float:
    """Evaluate Keys' cubic kernel."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def sampled(values: list[float], num_new: int) -> list[float]:
    """Interpolate a line of values at `num_new` places by the released rule: four values contribute, ends repeat."""
    num_old = len(values)
    found = []
    for place in range(num_new):
        # Center of this value among num_new + 0.1 new values over the length of the old ones.
        middle = (place + 0.5) * num_old / (num_new + 0.1) - 0.5
        first = math.floor(middle)
        found.append(
            sum(
                keys_cubic(middle - at, -0.75) * values[min(max(at, 0), num_old - 1)]
                for at in range(first - 1, first + 3)
            )
        )
    return found


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (6, 9), (16, 15)])
def test_released_positions_are_bicubic_with_a_tenth_of_a_patch_too_many(rows, columns):
    """Zero images give only positions: those of 14 x 14 patches, sampled by hand in float64."""
    vit = build_vit(**SIZES | {"image_size": 112}, name="vit_tiny_patch16_224", position_interpolation="released")
    torch.manual_seed(0)
    vit = vit.double()
    torch.nn.init.zeros_(vit.patch_embed.proj.bias)
    torch.nn.init.normal_(vit.pos_embed)
    tokens = embed(vit, torch.zeros(1, 3, 8 * rows, 8 * columns, dtype=torch.float64))[0, 1:]
    for channel in (0, 23):
        grid = vit.pos_embed[0, 1:, channel].view(14, 14).tolist()
        across = [sampled(line, columns) for line in grid]
        both = [sampled(list(line), rows) for line in zip(*across, strict=True)]
        expected = torch.tensor(both, dtype=torch.float64).T.flatten()
        torch.testing.assert_close(tokens[:, channel], expected, rtol=1e-9, atol=1e-9)
    vit.position_interpolation = "antialiased"
    other = embed(vit, torch.zeros(1, 3, 8 * rows, 8 * columns, dtype=torch.float64))[0, 1:]
    assert (other - tokens).abs().max() > 0.1
    whole = embed(vit, torch.zeros(1, 3, 112, 112, dtype=torch.float64))
    vit.position_interpolation = "released"
    assert torch.equal(embed(vit, torch.zeros(1, 3, 112, 112, dtype=torch.float64)), whole)


@pytest.mark.parametrize("std", [1e-6, 0.02])
def test_the_cls_token_begins_as_asked(std):
    torch.manual_seed(0)
    sizes = SIZES | {"width": 1536}
    vit = build_vit(**sizes | {"depth": 1}, name="vit_tiny_patch16_224", cls_token_std=std)
    assert vit.cls_token.std().item() == pytest.approx(std, rel=0.1)
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
