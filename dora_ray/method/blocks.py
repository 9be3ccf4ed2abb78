"""Transformer blocks of timm models over packed sequences of different lengths, without padding.

Everything in a block except attention acts on single tokens, so all views of a slot (whole frames, objects of any size,
small crops) share each matrix product.
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

# Attribute of a block that holds its compiled functions, a `_Forms`.
COMPILED = "compiled"
MOST_VARIANTS = 32
# Choose kernels by rule, not by timing, and never by the number of rows (one per sequence in the last block).
SAME_KERNELS: dict[str, str | int | bool | Callable[..., Any]] = {
    "deterministic": True,
    "triton.mix_order_reduction_non_strict_mode": True,
}


def run_block(block: Block, tokens: Tensor, layout: Layout) -> Tensor:
    """Return a block's output (P, D) for its input (P, D)."""
    begin: Callable[..., Tensor] = getattr(block, COMPILED, PLAIN).begin
    branch = self_attention(cast(Attention, block.attn), begin(block, tokens), layout)
    return _add_branches(block, tokens, branch, layout)


def cls_of_block(block: Block, tokens: Tensor, layout: Layout) -> Tensor:
    """Return a block's output at each sequence's first token, (S, D): one query, keys and values of all tokens."""
    branch = cls_attention(cast(Attention, block.attn), block.norm1(tokens), layout)
    alone = Layout(((layout.num_sequences, 1),), layout.device)
    return _add_branches(block, F.embedding(layout.firsts, tokens), branch, alone)


def cls_of_blocks(vit: VisionTransformer, tokens: Tensor, layout: Layout) -> Tensor:
    """Return the CLS token of every sequence after all blocks and the final norm, (S, D).

    The last block's outputs at other tokens are not computed. With `vit.set_grad_checkpointing()`, only the inputs of
    blocks are saved for the backward, which recomputes the rest.
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
    """Finish a block after its attention branch, (P, D), drawing its drop path."""
    finish: Callable[..., Tensor] = getattr(block, COMPILED, PLAIN).finish
    kept = [_kept(drop, tokens, layout) for drop in (block.drop_path1, block.drop_path2)]
    return finish(block, tokens, branch, *kept)


def _begin_block(block: Block, tokens: Tensor) -> Tensor:
    """Return queries, keys and values (P, 3 D) of tokens (P, D)."""
    projected: Tensor = cast(Attention, block.attn).qkv(block.norm1(tokens))
    return projected


def _finish_block(block: Block, tokens: Tensor, branch: Tensor, kept1: Tensor | None, kept2: Tensor | None) -> Tensor:
    """Add the branches of attention and MLP to tokens (P, D); `kept` are drop-path factors, (P, 1)."""
    tokens = _residual(tokens, block.ls1(branch), kept1)
    branch = block.ls2(_mlp(cast(Mlp, block.mlp), block.norm2(tokens)))
    return _residual(tokens, branch, kept2)


def _mlp(mlp: Mlp, tokens: Tensor) -> Tensor:
    """Return the MLP's output (P, D).

    Only GELU's input is saved for the backward: its output takes 4 D numbers a token, and little time to recompute.
    torch.compile decides this by itself.
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
    """Return tokens + kept x branch, (P, D), from twice (P, D) and (P, 1).

    The branch's gradient is rounded to half precision as it is computed; autograd would first write it in the float32
    of the tokens, and read it again.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, branch: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.dtype = branch.dtype
        # Autocast would first write the branch in float32.
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
    """Functions of a block that act on single tokens, before and after attention: `_begin_block`, `_finish_block`."""

    begin: Callable[..., Tensor]
    finish: Callable[..., Tensor]


PLAIN = _Forms(_begin_block, _finish_block)


def compile_blocks(vit: VisionTransformer, num_tokens: int) -> None:
    """Fuse the per-token operations of blocks (norms, casts, GELU, drop path, sums) with torch.compile.

    One compilation serves every block and every number of tokens, so other slots do not recompile. Torch caches
    compiled code for later processes of the node, in TORCHINDUCTOR_CACHE_DIR or in the node's temporary folder; a node
    that joins an elastic run recompiles unless the variable names a shared folder.

    Equal slots must give equal bits in every process, whatever it has run before. On a GPU, a sum over tokens is split
    by the expected number of tokens, which is therefore passed explicitly, and kernels are chosen by rule. On a CPU,
    the split does not depend on it. Verified by running on a CPU; for GPUs, only the generated code was inspected.

    Args:
        vit: the encoder whose blocks are compiled.
        num_tokens: expected P.
    """
    forms = _Forms(*(_for_tokens(_compiled(function), num_tokens) for function in (_begin_block, _finish_block)))
    for block in vit.blocks:
        setattr(block, COMPILED, forms)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Variants: with and without gradient, drop path, fp8 and autocast; on a CPU also for few and many tokens. The limit
    # is per process, because torch.compile takes its own only since 2.13.
    limits: Any = torch.compiler.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_VARIANTS)
    compiled: Callable[..., Tensor] = torch.compile(function, dynamic=True, options=SAME_KERNELS)
    return compiled


def _for_tokens(compiled: Callable[..., Tensor], num_tokens: int) -> Callable[..., Tensor]:
    """Wrap a compiled function of a block and tensors (P, ...), passing the expected P as a hint."""

    def call(block: Block, *tensors: Tensor | None) -> Tensor:
        for tensor in tensors:
            # A single row gets its own compilation.
            if tensor is not None and tensor.is_cuda and len(tensor) > 1:
                torch._dynamo.mark_dynamic(tensor, 0, hint_override=num_tokens)
        return compiled(block, *tensors)

    return call


def _kept(drop: nn.Module, tokens: Tensor, layout: Layout) -> Tensor | None:
    """Return factors (P, 1) that drop whole sequences, drawn as by timm, one number a sequence; None: drop none."""
    if isinstance(drop, nn.Identity) or not drop.training:
        return None
    kept: Tensor = drop(tokens.new_ones(layout.num_sequences, 1))
    if layout.num_tokens == layout.num_sequences:
        return kept
    return torch.repeat_interleave(kept, layout.lengths, dim=0, output_size=layout.num_tokens)
