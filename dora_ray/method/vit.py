"""timm's VisionTransformer, and what DoRA reads from one of its blocks beside the fused attention.

Fused attention never writes the (N + 1) x (N + 1) matrices down. DoRA needs one row of them, for the first frame, in
one block, and that block's projections; they are computed here from the block's own weights.
Shapes: B clips, B' images, T frames, C channels, N patches, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.method.precision import full_precision


@dataclass(frozen=True)
class Features:
    """What an encoder says about images, after its final norm.

    Attributes:
        cls: (B', D).
        patches: (B', N, D).
    """

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Tracked:
    """What objects are discovered and tracked with. Heads are concatenated in query and key; CLS is in neither.

    Attributes:
        cls: (B, T, D) CLS of every frame, after the final norm.
        patches0: (B, N, D) patch tokens of frame 0, after the final norm.
        query0: (B, N, D) queries of frame 0 in the chosen block.
        key: (B, T, N, D) keys of every frame in the chosen block.
        cls_attention0: (B, H, N) attention of CLS to the patches of frame 0 in the chosen block: a softmax over all
            tokens, without the columns of the tokens that are no patches.
    """

    cls: Tensor
    patches0: Tensor
    query0: Tensor
    key: Tensor
    cls_attention0: Tensor


def build_vit(
    *, name: str, width: int, depth: int, num_heads: int, patch_size: int, image_size: int, drop_path: float
) -> VisionTransformer:
    """A randomly initialized ViT without classifier that takes images of any multiple of the patch size.

    Args:
        name: timm architecture, such as "vit_small_patch16_224"; the sizes below override its own.
        width: D.
        depth: number of blocks.
        num_heads: H, a divisor of the width.
        patch_size: side of a patch, pixels.
        image_size: side of the images that the position embedding is made for, pixels.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first.

    Raises:
        ConfigError: if timm has no such model, or it is not a plain ViT.
    """
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}: name a ViT such as 'vit_small_patch16_224'")
    if width % num_heads:
        raise ConfigError(f"a width of {width} cannot be shared by {num_heads} heads: use a multiple of {num_heads}")
    vit = timm.create_model(
        name,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        img_size=image_size,
        dynamic_img_size=True,
        num_classes=0,
        drop_path_rate=drop_path,
        pretrained=False,
    )
    if not isinstance(vit, VisionTransformer) or not all(_is_plain(block) for block in vit.blocks):
        raise ConfigError(f"{name!r} is not a plain ViT with queries and keys: use 'vit_small_patch16_224'")
    return vit


def _is_plain(block: torch.nn.Module) -> bool:
    """Whether a block is the one whose forward `_last_block` repeats for CLS alone."""
    return type(block) is Block and type(block.attn) is Attention and block.attn.gate is None


def image_features(vit: VisionTransformer, images: Tensor) -> Features:
    """CLS and patch tokens of images (B', C, H, W) after the final norm."""
    tokens = vit.forward_features(images)
    return Features(cls=tokens[:, 0], patches=tokens[:, vit.num_prefix_tokens :])


def cls_features(vit: VisionTransformer, images: Tensor) -> Tensor:
    """CLS of images after the final norm, without computing what the last block would do to the other tokens.

    Args:
        vit: the encoder.
        images: (B', C, H, W).

    Returns:
        (B', D), what `image_features(vit, images).cls` gives.
    """
    tokens = _embed(vit, images)
    for block in vit.blocks[:-1]:
        tokens = block(tokens)
    return _normalize(vit, _cls_of_block(_block(vit, -1), tokens))[:, 0]


def tracked_features(vit: VisionTransformer, frames: Tensor, *, block: int) -> Tracked:
    """One pass over all frames of all clips, and what objects need from one block beside it.

    Args:
        vit: the encoder.
        frames: (B, T, C, H, W).
        block: the block whose projections give queries, keys and attention, from the end: -1 is the last.

    Raises:
        ValueError: if block is not a negative number of a block.
    """
    depth = len(vit.blocks)
    if not -depth <= block <= -1:
        raise ValueError(f"block={block}: blocks count from the end, use -{depth} to -1")
    num_clips, num_frames = frames.shape[:2]
    tokens = _embed(vit, frames.flatten(0, 1))
    for index in range(depth):
        if index == depth + block:
            query0, key, cls_attention0 = _projections(vit, block, torch.unflatten(tokens, 0, (num_clips, num_frames)))
        if index < depth - 1:
            tokens = vit.blocks[index](tokens)
    by_frame = torch.unflatten(tokens, 0, (num_clips, num_frames))
    first = _normalize(vit, vit.blocks[-1](by_frame[:, 0]))
    others = _normalize(vit, _cls_of_block(_block(vit, -1), by_frame[:, 1:].flatten(0, 1)))[:, 0]
    cls = torch.cat([first[:, :1], torch.unflatten(others, 0, (num_clips, num_frames - 1))], dim=1)
    return Tracked(cls, first[:, vit.num_prefix_tokens :], query0, key, cls_attention0)


def _embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens (B', 1 + N, D) before the first block."""
    tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    return tokens


def _block(vit: VisionTransformer, index: int) -> Block:
    return cast(Block, vit.blocks[index])


def _normalize(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    normalized: Tensor = vit.norm(tokens)
    return normalized


def _cls_of_block(block: Block, tokens: Tensor) -> Tensor:
    """The block's output at CLS (B', 1, D) from its input (B', 1 + N, D): one query, keys and values of all tokens."""
    attention = cast(Attention, block.attn)
    normalized = block.norm1(tokens)
    query = _project(attention, normalized[:, :1], 0)
    key, value = _project(attention, normalized, 1), _project(attention, normalized, 2)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    cls = tokens[:, :1] + block.drop_path1(block.ls1(attention.proj(attention.norm(mixed))))
    output: Tensor = cls + block.drop_path2(block.ls2(block.mlp(block.norm2(cls))))
    return output


def _project(attention: Attention, tokens: Tensor, part: int) -> Tensor:
    """Queries (part 0), keys (1) or values (2) of tokens (..., n, D), as (..., H, n, D / H)."""
    width = attention.attn_dim
    rows = slice(part * width, (part + 1) * width)
    bias = None if attention.qkv.bias is None else attention.qkv.bias[rows]
    projected = F.linear(tokens, attention.qkv.weight[rows], bias)
    heads = torch.unflatten(projected, -1, (attention.num_heads, attention.head_dim)).transpose(-3, -2)
    normalized: Tensor = (attention.q_norm, attention.k_norm, torch.nn.Identity())[part](heads)
    return normalized


def _projections(vit: VisionTransformer, index: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query0 (B, N, D), key (B, T, N, D), cls_attention0 (B, H, N) of a block's input (B, T, 1 + N, D)."""
    block, prefix = _block(vit, index), vit.num_prefix_tokens
    attention = cast(Attention, block.attn)
    normalized = block.norm1(tokens)
    query0 = _project(attention, normalized[:, 0], 0)
    key = _project(attention, normalized, 1)
    row = _attention_row(query0[:, :, 0], key[:, 0])
    return _concatenate(query0)[:, prefix:], _concatenate(key)[:, :, prefix:], row[:, :, prefix:]


@full_precision
def _attention_row(query: Tensor, key: Tensor) -> Tensor:
    """Softmax attention (B, H, n) of one query (B, H, d) to n keys (B, H, n, d)."""
    logits = torch.einsum("bhd,bhnd->bhn", query, key) * query.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1)


def _concatenate(heads: Tensor) -> Tensor:
    """(..., H, n, d) -> (..., n, D)."""
    return heads.transpose(-3, -2).flatten(-2)
