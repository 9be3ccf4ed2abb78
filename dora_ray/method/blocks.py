"""timm's transformer blocks over sequences of unlike lengths, laid one after the other without padding.

Everything in a block but the attention works on single tokens, so all views of a slot (whole frames, objects of any
size, small crops) share each matrix product. In the attention every sequence sees itself alone.
Shapes: S sequences, P tokens of all sequences together, D width, H heads, d = D / H.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from dora_ray.method.upload import upload

HALF = (torch.float16, torch.bfloat16)
# From so many runs on, one kernel for all lengths beats a call for each.
RUNS_FOR_KERNEL = 5
# Attribute of a block that holds its compiled forms, a `_Compiled`.
COMPILED = "compiled"
MOST_VARIANTS = 32
# Kernels by rule and not by their time; none by the number of rows, of which the last block has one a sequence.
SAME_KERNELS = {"deterministic": True, "triton.mix_order_reduction_non_strict_mode": True}


@dataclass(frozen=True)
class Layout:
    """Where sequences lie among the tokens.

    Attributes:
        runs: (count, length): so many sequences in a row have so many tokens each. Neighbors may have equal lengths.
        device: of the tokens.
    """

    runs: tuple[tuple[int, int], ...]
    device: torch.device

    @classmethod
    def of_lengths(cls, lengths: Iterable[int], device: torch.device) -> Layout:
        """Sequences of these lengths; best in order, since equal neighbors share one attention call."""
        runs = tuple((sum(1 for _ in group), length) for length, group in itertools.groupby(lengths))
        return cls(runs, device)

    def __add__(self, other: Layout) -> Layout:
        return Layout(self.runs + other.runs, self.device)

    @property
    def num_sequences(self) -> int:
        """S."""
        return sum(count for count, _ in self.runs)

    @property
    def num_tokens(self) -> int:
        """P."""
        return sum(self.tokens_of_runs)

    @property
    def tokens_of_runs(self) -> list[int]:
        """Tokens of each run."""
        return [count * length for count, length in self.runs]

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return max(length for _, length in self.runs)

    @cached_property
    def lengths(self) -> Tensor:
        """(S,) int64 on the device, made from the runs: the host waits for nothing."""
        counts, lengths = upload(torch.tensor(self.runs), self.device).T
        return torch.repeat_interleave(lengths, counts, output_size=self.num_sequences)

    @cached_property
    def bounds(self) -> Tensor:
        """(S + 1,) int32: sequence s is tokens bounds[s] to bounds[s + 1]."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    @cached_property
    def firsts(self) -> Tensor:
        """(S,) int64: the place of each sequence's first token, which is CLS."""
        return self.bounds[:-1].long()


def run_block(block: Block, tokens: Tensor, layout: Layout) -> Tensor:
    """A block's output (P, D) from its input (P, D)."""
    begin: Callable[..., Tensor] = getattr(block, COMPILED, PLAIN).begin
    branch = _self_attention(cast(Attention, block.attn), begin(block, tokens), layout)
    return _add_branches(block, tokens, branch, layout)


def cls_of_block(block: Block, tokens: Tensor, layout: Layout) -> Tensor:
    """A block's output at the first token of each sequence, (S, D): one query, keys and values of all tokens."""
    attention = cast(Attention, block.attn)
    normalized = block.norm1(tokens)
    # The backward of indexing adds in any order on a GPU; that of an embedding does not.
    query = project(attention, F.embedding(layout.firsts, normalized), 0)
    key_value = torch.unflatten(
        _linear_rows(attention, normalized, slice(attention.attn_dim, None)), -1, (2, *_heads(attention))
    )
    branch = _cls_attention(attention, query, key_value, layout)
    alone = Layout(((layout.num_sequences, 1),), layout.device)
    return _add_branches(block, F.embedding(layout.firsts, tokens), branch, alone)


def cls_of_blocks(vit: VisionTransformer, tokens: Tensor, layout: Layout) -> Tensor:
    """CLS of every sequence after all blocks and the final norm, (S, D).

    What the last block would do to the other tokens is not computed. With `vit.set_grad_checkpointing()` only the
    inputs of the blocks are kept for the backward, which computes the rest again.
    """
    blocks = cast(Sequence[Block], vit.blocks)
    recompute = bool(vit.grad_checkpointing) and torch.is_grad_enabled()
    for block in blocks[:-1]:
        tokens = (
            checkpoint(run_block, block, tokens, layout, use_reentrant=False)
            if recompute
            else run_block(block, tokens, layout)
        )
    normalized: Tensor = vit.norm(cls_of_block(blocks[-1], tokens, layout))
    return normalized


def project(attention: Attention, tokens: Tensor, part: int) -> Tensor:
    """Queries (part 0), keys (1) or values (2) of tokens (..., D), as (..., H, d)."""
    width = attention.attn_dim
    heads = torch.unflatten(
        _linear_rows(attention, tokens, slice(part * width, (part + 1) * width)), -1, _heads(attention)
    )
    normalized: Tensor = (attention.q_norm, attention.k_norm, nn.Identity())[part](heads)
    return normalized


def _heads(attention: Attention) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


def _linear_rows(attention: Attention, tokens: Tensor, rows: slice) -> Tensor:
    """Some of the outputs of the layer that makes queries, keys and values."""
    bias = None if attention.qkv.bias is None else attention.qkv.bias[rows]
    return F.linear(tokens, attention.qkv.weight[rows], bias)


def _self_attention(attention: Attention, qkv: Tensor, layout: Layout) -> Tensor:
    """The attention's branch (P, D) from the projections (P, 3 D)."""
    parts = torch.unflatten(qkv, -1, (3, *_heads(attention)))
    if _has_kernel(qkv, layout):
        query, key, value = parts.unbind(1)
        query, key = attention.q_norm(query), attention.k_norm(key)
        return _project_mixed(attention, [_attend_unlike(query, key, value, layout, layout.bounds, layout.longest)])
    mixed = [
        _attend(attention.q_norm(query), attention.k_norm(key), value) for query, key, value in _runs(parts, layout)
    ]
    return _project_mixed(attention, mixed)


def _cls_attention(attention: Attention, query: Tensor, key_value: Tensor, layout: Layout) -> Tensor:
    """The branch (S, D) from a query of each sequence (S, H, d) and the keys and values of all tokens (P, 2, H, d)."""
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
    """The attention's branch (P, D), from the values that it has mixed for each run.

    Attention keeps its results for the backward and the projection what it is given. While they are the same tensors,
    they are kept once; where runs are many and short, one product is quicker.
    """
    if len(runs) >= RUNS_FOR_KERNEL:
        runs = [torch.cat(runs)]
    projected = [cast(Tensor, attention.proj(attention.norm(run))) for run in runs]
    return projected[0] if len(projected) == 1 else torch.cat(projected)


def _has_kernel(tokens: Tensor, layout: Layout) -> bool:
    """Whether to use torch's attention over unlike lengths, which there is in half precision on a GPU."""
    return tokens.is_cuda and tokens.dtype in HALF and len(layout.runs) >= RUNS_FOR_KERNEL


def _attend_unlike(query: Tensor, key: Tensor, value: Tensor, layout: Layout, queries: Tensor, most: int) -> Tensor:
    """(queries, D) from (queries, H, d), and (P, H, d) twice; sequence s asks queries[s] to queries[s + 1]."""
    longest = layout.longest
    mixed = varlen_attn(
        # The norms of queries and keys give float32 under autocast.
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        queries,
        layout.bounds,
        most,
        longest,
        # Wide enough to hide nothing. Without a window torch takes cuDNN where it can (on an H100, sequences of over
        # 128 tokens): its backward heeds no use_deterministic_algorithms, and each number of tokens is planned anew.
        window_size=(longest, longest),
    )
    return cast(Tensor, mixed).flatten(1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(sequences x queries, D) from (sequences, H, queries, d), and (sequences, H, tokens, d) twice."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1).flatten(1)


def _runs(projections: Tensor, layout: Layout) -> list[tuple[Tensor, ...]]:
    """Of each run its queries, keys and values, or some of them: (sequences, H, tokens, d) of (P, parts, H, d)."""
    views: tuple[Tensor, ...] = _Views.apply(projections, layout)
    count = projections.shape[1]
    return [views[first : first + count] for first in range(0, len(views), count)]


class _Views(torch.autograd.Function):
    """The parts of each run, one after the other, where the projections lie.

    Their gradients are written to where those of the projections lie, once; autograd would stack the parts of a run,
    and then copy the runs together.
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


def _add_branches(block: Block, tokens: Tensor, branch: Tensor, layout: Layout) -> Tensor:
    """The rest of a block after its attention's branch, (P, D); what it draws is drawn here."""
    finish: Callable[..., Tensor] = getattr(block, COMPILED, PLAIN).finish
    kept = [_kept(drop, tokens, layout) for drop in (block.drop_path1, block.drop_path2)]
    return finish(block, tokens, branch, *kept)


def _begin_block(block: Block, tokens: Tensor) -> Tensor:
    """Queries, keys and values (P, 3 D) of tokens (P, D)."""
    projected: Tensor = cast(Attention, block.attn).qkv(block.norm1(tokens))
    return projected


def _finish_block(block: Block, tokens: Tensor, branch: Tensor, kept1: Tensor | None, kept2: Tensor | None) -> Tensor:
    """Tokens (P, D) with the attention's branch and the MLP's added; `kept` are factors of drop path, (P, 1)."""
    tokens = _residual(tokens, block.ls1(branch), kept1)
    branch = block.ls2(_mlp(cast(Mlp, block.mlp), block.norm2(tokens)))
    return _residual(tokens, branch, kept2)


def _mlp(mlp: Mlp, tokens: Tensor) -> Tensor:
    """The MLP's output (P, D).

    For the backward only what goes into GELU is kept: what comes out takes 4 D numbers a token, and little time to
    compute again. With torch.compile that is found out by itself.
    """
    hidden = mlp.fc1(tokens)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _after_hidden(mlp, hidden)
    output: Tensor = checkpoint(_after_hidden, mlp, hidden, use_reentrant=False, preserve_rng_state=False)
    return output


def _after_hidden(mlp: Mlp, hidden: Tensor) -> Tensor:
    return cast(Tensor, mlp.fc2(mlp.act(hidden)))


def _residual(tokens: Tensor, branch: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return tokens + branch
    if torch.compiler.is_compiling():
        return torch.addcmul(tokens, branch, kept)
    output: Tensor = _DroppedResidual.apply(tokens, branch, kept)
    return output


class _DroppedResidual(torch.autograd.Function):
    """tokens + kept x branch, (P, D) from (P, D) twice and (P, 1).

    The branch's gradient is rounded to its half precision as it is computed: autograd would write it down in the
    float32 of the tokens first, and read it again.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, branch: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.dtype = branch.dtype
        # Autocast would write the branch down in float32 first.
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.addcmul(tokens, branch, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (kept,) = ctx.saved_tensors
        of_branch = torch.empty_like(gradient, dtype=ctx.dtype)
        return gradient, torch.mul(gradient, kept, out=of_branch), None


@dataclass(frozen=True)
class _Forms:
    """What a block does to single tokens, before and after its attention: `_begin_block`, `_finish_block`."""

    begin: Callable[..., Tensor]
    finish: Callable[..., Tensor]


PLAIN = _Forms(_begin_block, _finish_block)


def compile_blocks(vit: VisionTransformer, num_tokens: int) -> None:
    """Let torch.compile make few kernels of what blocks do to single tokens: norms, casts, GELU, drop path, sums.

    One compilation serves every block and every number of tokens, so no other slot compiles again. Torch keeps what it
    compiled for the next process of the node, in TORCHINDUCTOR_CACHE_DIR or else in the node's temporary folder; a node
    that joins an elastic run compiles anew, unless the variable names a folder that the nodes share.

    Equal slots have to give equal bits in every process, whatever it has met before. A sum over tokens is split for a
    GPU by the number of tokens that is expected, which therefore is stated, and kernels are chosen by rule. For a CPU
    it is not split by that number. Seen on a CPU; for a GPU only what torch generates was looked at.

    Args:
        vit: the encoder whose blocks are compiled.
        num_tokens: P that is expected.
    """
    forms = _Forms(*(_for_tokens(_compiled(function), num_tokens) for function in (_begin_block, _finish_block)))
    for block in vit.blocks:
        setattr(block, COMPILED, forms)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Once each: with and without gradient, dropped paths, fp8, autocast; for a CPU also for few and many tokens.
    compiled: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload] # which leaves out the last keyword
        function, dynamic=True, options=SAME_KERNELS, recompile_limit=MOST_VARIANTS
    )
    return compiled


def _for_tokens(compiled: Callable[..., Tensor], num_tokens: int) -> Callable[..., Tensor]:
    """A compiled function of a block and tensors (P, ...), told of the expected P."""

    def call(block: Block, *tensors: Tensor | None) -> Tensor:
        for tensor in tensors:
            # A single row is compiled for by itself.
            if tensor is not None and tensor.is_cuda and len(tensor) > 1:
                torch._dynamo.mark_dynamic(tensor, 0, hint_override=num_tokens)
        return compiled(block, *tensors)

    return call


def _kept(drop: nn.Module, tokens: Tensor, layout: Layout) -> Tensor | None:
    """Factors (P, 1) that drop whole sequences, drawn as timm draws them, one number a sequence; None drops none."""
    if isinstance(drop, nn.Identity) or not drop.training:
        return None
    kept: Tensor = drop(tokens.new_ones(layout.num_sequences, 1))
    if layout.num_tokens == layout.num_sequences:
        return kept
    return torch.repeat_interleave(kept, layout.lengths, dim=0, output_size=layout.num_tokens)
