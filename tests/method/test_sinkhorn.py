from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dora_ray.method.sinkhorn import sinkhorn_knopp
from tests.oracles import method as oracle

SCORES = arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(1, 4)),
    elements=st.floats(-1.0, 1.0, width=32),
)


@settings(deadline=None, max_examples=40)
@given(scores=SCORES, epsilon=st.sampled_from([0.05, 0.3, 2.0]), num_iterations=st.integers(1, 8))
def test_equals_the_kernel_divided_in_turn(scores, epsilon, num_iterations):
    ours = sinkhorn_knopp(torch.from_numpy(scores), epsilon=epsilon, num_iterations=num_iterations)
    expected = np.stack([oracle.sinkhorn_knopp(clip, epsilon, num_iterations) for clip in scores])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(scores=SCORES, scale=st.sampled_from([0.0, 1.0, 1e3, 1e8]), num_iterations=st.sampled_from([1, 2, 30]))
def test_rows_sum_to_one_for_scores_of_any_size(scores, scale, num_iterations):
    scores = torch.from_numpy(scores).float() * scale
    ours = sinkhorn_knopp(scores, epsilon=0.05, num_iterations=num_iterations)
    torch.testing.assert_close(ours.sum(dim=2), torch.ones(scores.shape[:2]), rtol=0, atol=1e-6)
    assert bool((ours >= 0).all())


@settings(deadline=None, max_examples=25)
@given(scores=SCORES)
def test_columns_tend_to_their_share(scores):
    scores = torch.from_numpy(scores)
    num_patches, num_objects = scores.shape[1:]

    def error(num_iterations: int) -> float:
        columns = sinkhorn_knopp(scores, epsilon=1.0, num_iterations=num_iterations).sum(dim=1)
        return float((columns - num_patches / num_objects).abs().max())

    assert error(60) < 1e-6
    assert error(60) <= error(1) + 1e-9


def test_permuted_objects_and_patches_give_permuted_assignments():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    rows, columns = torch.randperm(9, generator=generator), torch.tensor([2, 0, 1])
    straight = sinkhorn_knopp(scores, epsilon=0.05, num_iterations=30)
    permuted = sinkhorn_knopp(scores[:, rows][:, :, columns], epsilon=0.05, num_iterations=30)
    torch.testing.assert_close(permuted, straight[:, rows][:, :, columns], rtol=1e-9, atol=1e-12)


def test_has_no_gradient_and_stays_precise_in_half_precision():
    scores = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = sinkhorn_knopp(scores, epsilon=0.05, num_iterations=30)
    assert not ours.requires_grad
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, sinkhorn_knopp(scores.float(), epsilon=0.05, num_iterations=30))


@pytest.mark.parametrize(("epsilon", "num_iterations", "named"), [(0.05, 0, "num_iterations"), (0.0, 3, "epsilon")])
def test_refuses_too_few_iterations(epsilon, num_iterations, named):
    with pytest.raises(ValueError, match=f"{named}=0"):
        sinkhorn_knopp(torch.zeros(1, 4, 2), epsilon=epsilon, num_iterations=num_iterations)
