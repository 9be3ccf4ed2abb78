"""timm's transformer blocks over sequences of unlike lengths, laid one after the other without padding.

Everything in a block but the attention works on single tokens, so all views of a slot (whole frames, objects of any
size, small crops) share each matrix product.
Shapes: S sequences, P tokens of all sequences together, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dora_ray.method.attention import Layout, cls_attention, self_attention

# Attribute of a block that holds its compiled forms, `_Forms`.
COMPILED = "compiled"
MOST_VARIANTS = 32
# Kernels by rule and not by their time; none by the number of rows, of which the last block has one a sequence.
SAME_KERNELS: dict[str, str | int | bool | Callable[..., Any]] = {
    "deterministic": True,
    "triton.mix_order_reduction_non_strict_mode": True,
}


def run_block(block: Block, tokens: Tensor, layout: Layout) -> Tensor:
    """A block's output (P, D) from its input (P, D)."""
    begin: Callable[..., Tensor] = getattr(block, COMPILED, PLAIN).begin
    branch = self_attention(cast(Attention, block.attn), begin(block, tokens), layout)
    return _add_branches(block, tokens, branch, layout)


def cls_of_block(block: Block, tokens: Tensor, layout: Layout) -> Tensor:
    """A block's output at the first token of each sequence, (S, D): one query, keys and values of all tokens."""
    branch = cls_attention(cast(Attention, block.attn), block.norm1(tokens), layout)
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
    """The parts of a block that act on single tokens, before and after attention: `_begin_block`, `_finish_block`."""

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
    # The limit is the process's: torch.compile takes one of its own only since 2.13.
    limits: Any = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_VARIANTS)
    compiled: Callable[..., Tensor] = torch.compile(function, dynamic=True, options=SAME_KERNELS)
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
