"""Self-attention of timm models over packed sequences of different lengths, without padding or cross-talk.

Shapes: S sequences, P tokens of all sequences together, D width, H heads, d = D / H.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from dora_ray.method.upload import upload

HALF = (torch.float16, torch.bfloat16)
# From this many runs on, one kernel for all lengths is faster than a call for each run.
RUNS_FOR_KERNEL = 5


@dataclass(frozen=True)
class Layout:
    """Positions of packed sequences among the tokens.

    Attributes:
        runs: (count, length) pairs: `count` consecutive sequences of `length` tokens. Neighbors may have equal lengths.
        device: device of the tokens.
    """

    runs: tuple[tuple[int, int], ...]
    device: torch.device

    @classmethod
    def of_lengths(cls, lengths: Iterable[int], device: torch.device) -> Layout:
        """Return a layout for these lengths; sort them, since equal neighbors share an attention call."""
        runs = tuple((sum(1 for _ in group), length) for length, group in itertools.groupby(lengths))
        return cls(runs, device)

    def __add__(self, other: Layout) -> Layout:
        return Layout(self.runs + other.runs, self.device)

    @property
    def num_sequences(self) -> int:
        """Number of sequences, S."""
        return sum(count for count, _ in self.runs)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, P."""
        return sum(self.tokens_of_runs)

    @property
    def tokens_of_runs(self) -> list[int]:
        """Tokens of each run."""
        return [count * length for count, length in self.runs]

    @property
    def longest(self) -> int:
        """Length of the longest sequence in tokens."""
        return max(length for _, length in self.runs)

    @cached_property
    def lengths(self) -> Tensor:
        """(S,) int64 on the device, built from the runs without a host synchronization."""
        if len(self.runs) < RUNS_FOR_KERNEL:
            # Few runs need no copy from the host, which a CUDA graph could not repeat.
            return torch.cat([torch.full((count,), length, device=self.device) for count, length in self.runs])
        counts, lengths = upload(torch.tensor(self.runs), self.device).T
        return torch.repeat_interleave(lengths, counts, output_size=self.num_sequences)

    @cached_property
    def bounds(self) -> Tensor:
        """(S + 1,) int32: sequence s is tokens bounds[s] to bounds[s + 1]."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    @cached_property
    def firsts(self) -> Tensor:
        """(S,) int64 position of each sequence's first token, which is CLS."""
        return self.bounds[:-1].long()


def project(attention: Attention, tokens: Tensor, part: int) -> Tensor:
    """Return queries (part 0), keys (1) or values (2) of tokens (..., D), as (..., H, d)."""
    width = attention.attn_dim
    heads = torch.unflatten(
        _linear_rows(attention, tokens, slice(part * width, (part + 1) * width)), -1, _heads(attention)
    )
    normalized: Tensor = (attention.q_norm, attention.k_norm, nn.Identity())[part](heads)
    return normalized


def _heads(attention: Attention) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _linear_rows(attention: Attention, tokens: Tensor, rows: slice) -> Tensor:
    """Return some of the outputs of the layer that computes queries, keys and values."""
    bias = None if attention.qkv.bias is None else attention.qkv.bias[rows]
    return F.linear(tokens, attention.qkv.weight[rows], bias)


def self_attention(attention: Attention, qkv: Tensor, layout: Layout) -> Tensor:
    """Return the attention branch (P, D) from the projections (P, 3 D)."""
    parts = torch.unflatten(qkv, -1, (3, *_heads(attention)))
    if _has_kernel(qkv, layout):
        query, key, value = parts.unbind(1)
        query, key = attention.q_norm(query), attention.k_norm(key)
        return _project_mixed(attention, [_attend_unlike(query, key, value, layout, layout.bounds, layout.longest)])
    mixed = [
        _attend(attention.q_norm(query), attention.k_norm(key), value) for query, key, value in _runs(parts, layout)
    ]
    return _project_mixed(attention, mixed)


def cls_attention(attention: Attention, normalized: Tensor, layout: Layout) -> Tensor:
    """Return the branch (S, D) of each sequence's first token, from normalized tokens (P, D).

    Each sequence has one query, but keys and values of all its tokens.
    """
    # On a GPU, the backward of indexing adds in nondeterministic order; that of an embedding does not.
    query = project(attention, F.embedding(layout.firsts, normalized), 0)
    key_value = torch.unflatten(
        _linear_rows(attention, normalized, slice(attention.attn_dim, None)), -1, (2, *_heads(attention))
    )
    if _has_kernel(key_value, layout):
        key, value = key_value.unbind(1)
        singles = torch.arange(layout.num_sequences + 1, dtype=torch.int32, device=layout.device)
        return _project_mixed(attention, [_attend_unlike(query, attention.k_norm(key), value, layout, singles, 1)])
    queries = torch.split(query, [count for count, _ in layout.runs])
    mixed = [
        _attend(one.unsqueeze(2), attention.k_norm(key), value)
        for one, (key, value) in zip(queries, _runs(key_value, layout), strict=True)
    ]
    return _project_mixed(attention, mixed)


def _project_mixed(attention: Attention, runs: list[Tensor]) -> Tensor:
    """Return the attention branch (P, D), from the mixed values of each run.

    Autograd saves the attention's output and the projection's input. As long as these are the same tensor, it is stored
    once; for many short runs, a single product is faster.
    """
    if len(runs) >= RUNS_FOR_KERNEL:
        runs = [torch.cat(runs)]
    projected = [cast(Tensor, attention.proj(attention.norm(run))) for run in runs]
    return projected[0] if len(projected) == 1 else torch.cat(projected)


def _has_kernel(tokens: Tensor, layout: Layout) -> bool:
    """Return whether to use torch's variable-length attention, which exists in half precision on a GPU."""
    return tokens.is_cuda and tokens.dtype in HALF and len(layout.runs) >= RUNS_FOR_KERNEL


def _attend_unlike(query: Tensor, key: Tensor, value: Tensor, layout: Layout, queries: Tensor, most: int) -> Tensor:
    """Return (queries, D) from (queries, H, d) and twice (P, H, d); sequence s owns queries[s] to queries[s + 1]."""
    longest = layout.longest
    mixed = varlen_attn(
        # The norms of queries and keys return float32 under autocast.
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        queries,
        layout.bounds,
        most,
        longest,
        # Wide enough to mask nothing. Without a window, torch uses cuDNN where it can (on an H100, for sequences over
        # 128 tokens): its backward ignores use_deterministic_algorithms, and it plans anew for each number of tokens.
        window_size=(longest, longest),
    )
    return cast(Tensor, mixed).flatten(1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return (sequences x queries, D) from (sequences, H, queries, d) and twice (sequences, H, tokens, d)."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1).flatten(1)


def _runs(projections: Tensor, layout: Layout) -> list[tuple[Tensor, ...]]:
    """Return each run's queries, keys and values, or a subset: (sequences, H, tokens, d) from (P, parts, H, d)."""
    views: tuple[Tensor, ...] = _Views.apply(projections, layout)
    count = projections.shape[1]
    return [views[first : first + count] for first in range(0, len(views), count)]


class _Views(torch.autograd.Function):
    """Views of each run's parts within the projections.

    The backward writes gradients directly into one tensor like the projections; autograd would stack the parts of each
    run, and then concatenate the runs.
    """

    @staticmethod
    def forward(ctx: Any, projections: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        ctx.layout, ctx.shape = layout, projections.shape
        return _views(projections, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        joined = gradients[0].new_empty(ctx.shape)
        for place, gradient in zip(_views(joined, ctx.layout), gradients, strict=True):
            place.copy_(gradient)
        return joined, None


def _views(projections: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    runs = zip(torch.split(projections, layout.tokens_of_runs), layout.runs, strict=True)
    return tuple(part.transpose(1, 2) for run, shape in runs for part in torch.unflatten(run, 0, shape).unbind(2))
