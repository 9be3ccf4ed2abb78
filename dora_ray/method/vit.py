"""timm's VisionTransformer, and what DoRA reads from one of its blocks beside the fused attention.

Fused attention never writes the (N + 1) x (N + 1) matrices down. DoRA needs one row of them, for the first frame, in
one block, and that block's projections; they are computed here from the block's own weights.
Shapes: B clips, B' images, T frames, C channels, N patches, D width, H heads.
"""

from __future__ import annotations

import functools
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

Grid = tuple[int, int]


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
            tokens, without the column of CLS itself.
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
    if not isinstance(vit, VisionTransformer) or not _is_plain(vit):
        raise ConfigError(f"{name!r} is not a plain ViT with queries and keys: use 'vit_small_patch16_224'")
    return vit


def _is_plain(vit: VisionTransformer) -> bool:
    """Whether `embed` and `_cls_of_block` do what the model's own forward does: a CLS token, no other, plain blocks."""
    plain_tokens = vit.has_class_token and vit.num_prefix_tokens == 1 and vit.pos_embed is not None
    return (
        plain_tokens
        and not vit.no_embed_class
        and all(type(b) is Block and type(b.attn) is Attention and b.attn.gate is None for b in vit.blocks)
    )


def image_features(vit: VisionTransformer, images: Tensor) -> Features:
    """CLS and patch tokens of images (B', C, H, W) after the final norm."""
    tokens = vit.forward_features(images)
    return Features(cls=tokens[:, 0], patches=tokens[:, 1:])


def cls_features(vit: VisionTransformer, images: Tensor) -> Tensor:
    """CLS of images after the final norm, without computing what the last block would do to the other tokens.

    Args:
        vit: the encoder.
        images: (B', C, H, W).

    Returns:
        (B', D), what `image_features(vit, images).cls` gives.
    """
    tokens = embed(vit, images)
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
    tokens = embed(vit, frames.flatten(0, 1))
    for index in range(depth):
        if index == depth + block:
            query0, key, cls_attention0 = _projections(vit, block, torch.unflatten(tokens, 0, (num_clips, num_frames)))
        if index < depth - 1:
            tokens = vit.blocks[index](tokens)
    by_frame = torch.unflatten(tokens, 0, (num_clips, num_frames))
    first = _normalize(vit, vit.blocks[-1](by_frame[:, 0]))
    others = _normalize(vit, _cls_of_block(_block(vit, -1), by_frame[:, 1:].flatten(0, 1)))[:, 0]
    cls = torch.cat([first[:, :1], torch.unflatten(others, 0, (num_clips, num_frames - 1))], dim=1)
    return Tracked(cls, first[:, 1:], query0, key, cls_attention0)


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens (B', 1 + N, D) before the first block, of images (B', C, H, W) of any multiple of the patch size."""
    patches = vit.patch_embed(images)
    cls_token = cast(Tensor, vit.cls_token).expand(len(images), -1, -1)
    positions = _positions(cast(Tensor, vit.pos_embed), vit.patch_embed.grid_size, tuple(patches.shape[1:3]))
    tokens = torch.cat([cls_token, patches.flatten(1, 2)], dim=1) + positions
    embedded: Tensor = vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))
    return embedded


@full_precision
def _positions(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """The position embedding (1, 1 + N, D) of one grid for another grid.

    timm interpolates it with a kernel whose backward adds in any order on a GPU, which would make equal runs differ.
    The same interpolation as a product with a constant matrix is deterministic.
    """
    if old == new:
        return pos_embed
    matrix = _interpolation(old, new, pos_embed.dtype, pos_embed.device)
    return torch.cat([pos_embed[:, :1], matrix @ pos_embed[:, 1:]], dim=1)


@functools.lru_cache(maxsize=16)
def _interpolation(old: Grid, new: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (new patches, old patches) of timm's bicubic, antialiased interpolation between two grids."""
    num_old = old[0] * old[1]
    # A tensor made in inference mode could never be used in a backward, and this one is kept.
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(num_old, dtype=torch.float64).view(num_old, 1, *old)
        columns = F.interpolate(units, size=new, mode="bicubic", antialias=True)
        return columns.flatten(1).T.contiguous().to(device=device, dtype=dtype)


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
    block = _block(vit, index)
    attention = cast(Attention, block.attn)
    normalized = block.norm1(tokens)
    query0 = _project(attention, normalized[:, 0], 0)
    key = _project(attention, normalized, 1)
    row = _attention_row(query0[:, :, 0], key[:, 0])
    return _concatenate(query0)[:, 1:], _concatenate(key)[:, :, 1:], row[:, :, 1:]


@full_precision
def _attention_row(query: Tensor, key: Tensor) -> Tensor:
    """Softmax attention (B, H, n) of one query (B, H, d) to n keys (B, H, n, d)."""
    logits = torch.einsum("bhd,bhnd->bhn", query, key) * query.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1)


def _concatenate(heads: Tensor) -> Tensor:
    """(..., H, n, d) -> (..., n, D)."""
    return heads.transpose(-3, -2).flatten(-2)
