"""Sinkhorn-Knopp in the log domain.

Shapes: B clips, N patches, K objects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_ray.method.precision import full_precision


@torch.no_grad()
@full_precision
def sinkhorn_knopp(scores: Tensor, *, epsilon: float, num_iterations: int) -> Tensor:
    """Assign patches softly to objects, with balanced objects: M* of arXiv 2310.08584, section 4.

    The naive loop, whose exponential overflows for large scores and whose rows underflow for small epsilon::

            M = exp(scores / epsilon)
            repeat num_iterations times:
                M = M / M.sum(patches) * N / K      # each object gets its share of the patches
                M = M / M.sum(objects)              # each patch is assigned exactly once

    Only the logarithms of the two scalings are iterated here, so nothing overflows and rounding does not accumulate.

    Args:
        scores: (B, N, K) similarities, the negative cost.
        epsilon: entropic regularization, in the unit of the scores; smaller is harder.
        num_iterations: at least 1.

    Returns:
        (B, N, K), without gradient: every row sums to 1, every column tends to N / K.

    Raises:
        ValueError: num_iterations is less than 1, or epsilon is not positive.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations}: Sinkhorn-Knopp needs num_iterations of at least 1")
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon}: Sinkhorn-Knopp needs a positive epsilon")
    log_kernel = scores / epsilon
    log_rows = torch.zeros_like(log_kernel[:, :, :1])
    for _ in range(num_iterations):
        # The factor N / K is omitted: it is the same for all columns, and normalizing the rows cancels it.
        log_columns = _normalizer(log_kernel + log_rows, dim=1)
        log_rows = _normalizer(log_kernel + log_columns, dim=2)
    return torch.softmax(log_kernel + log_columns, dim=2)


def _normalizer(logits: Tensor, *, dim: int) -> Tensor:
    """Return -logsumexp(logits, dim, keepdim=True), with a third of torch.logsumexp's kernels on a GPU."""
    return torch.log_softmax(logits, dim).narrow(dim, 0, 1) - logits.narrow(dim, 0, 1)
