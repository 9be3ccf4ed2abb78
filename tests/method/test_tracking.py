from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_ray.method import tracking
from tests.oracles import method as oracle

B, K, T, N, D = 2, 3, 4, 9, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_maps(seed: int) -> torch.Tensor:
    return torch.softmax(2 * draw(B, K, T, N, seed=seed), dim=-1)


def test_prototypes_equal_the_loop():
    attention, query = torch.rand(B, K, N, dtype=torch.float64), draw(B, N, D)
    ours = tracking.object_prototypes(attention, query)
    np.testing.assert_allclose(ours, oracle.object_prototypes(attention.numpy(), query.numpy()), rtol=1e-12)


@pytest.mark.parametrize("num_iterations", [1, 5, 30])
def test_refined_prototypes_equal_the_loop(num_iterations):
    prototypes, patches = draw(B, K, D, seed=1), draw(B, N, D, seed=2)
    ours = tracking.refine_prototypes(prototypes, patches, epsilon=0.5, num_iterations=num_iterations)
    expected = oracle.refine_prototypes(prototypes.numpy(), patches.numpy(), 0.5, num_iterations)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_no_iterations_leave_the_prototypes_as_they_are():
    prototypes = draw(B, K, D)
    assert torch.equal(tracking.refine_prototypes(prototypes, draw(B, N, D), epsilon=1, num_iterations=0), prototypes)


def test_refined_prototypes_share_out_the_patches():
    """Each P' sums about N / K patches, so together they sum every patch once."""
    patches = draw(B, N, D, seed=2)
    refined = tracking.refine_prototypes(draw(B, K, D, seed=1), patches, epsilon=0.05, num_iterations=30)
    torch.testing.assert_close(refined.sum(dim=1), patches.sum(dim=1))


def test_maps_equal_the_loop():
    prototypes, key = draw(B, K, D, seed=1), draw(B, T, N, D, seed=2)
    ours = tracking.attention_maps(prototypes, key)
    np.testing.assert_allclose(ours, oracle.attention_maps(prototypes.numpy(), key.numpy()), rtol=1e-12)


@pytest.mark.parametrize("threshold", ["clip", "batch", "soft"])
@pytest.mark.parametrize("seed", range(5))
def test_masks_equal_the_loop(threshold, seed):
    maps = draw_maps(seed)
    ours = tracking.object_masks(maps, threshold=threshold)
    assert ours.dtype == maps.dtype
    np.testing.assert_allclose(ours, oracle.object_masks(maps.numpy(), threshold), rtol=1e-12)


def test_a_flat_map_keeps_one_patch():
    maps = torch.full((1, 2, 2, 16), 1 / 16)
    assert tracking.object_masks(maps, threshold="clip").sum(dim=-1).eq(1).all()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_clip_masks_do_not_depend_on_the_other_clips(seed):
    maps = draw_maps(seed)
    together = tracking.object_masks(maps, threshold="clip")
    alone = torch.cat([tracking.object_masks(clip[None], threshold="clip") for clip in maps])
    assert torch.equal(together, alone)
    assert set(together.unique().tolist()) <= {0.0, 1.0}
    areas = together.sum(dim=-1)
    assert bool(((areas >= 1) & (areas < N)).all())


def test_batch_masks_do_depend_on_the_other_clips():
    """With the released rule, a clip of flat maps has unit maps above all others'; the threshold "clip" avoids this."""
    maps = torch.cat([draw_maps(0)[:1], torch.full((1, K, T, N), 1 / N, dtype=torch.float64)])
    together = tracking.object_masks(maps, threshold="batch")
    alone = tracking.object_masks(maps[:1], threshold="batch")
    assert not torch.equal(together[:1], alone)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from(["clip", "batch", "soft"]))
def test_random_masks_are_the_same_values_where_the_noise_is_largest(seed, threshold):
    masks = tracking.object_masks(draw_maps(seed), threshold=threshold)
    noise = torch.rand(B, K, T, N, generator=torch.Generator().manual_seed(seed))
    shuffled = tracking.random_masks(masks, noise)
    assert torch.equal(shuffled.sort(dim=-1).values, masks.sort(dim=-1).values)
    by_noise = shuffled.gather(-1, noise.argsort(dim=-1, descending=True))
    assert bool((by_noise.diff(dim=-1) <= 0).all())


def test_an_unknown_threshold_names_the_known_ones():
    with pytest.raises(ValueError, match="'clip', 'batch' or 'soft'"):
        tracking.object_masks(draw_maps(0), threshold="otsu")  # type: ignore[arg-type]
