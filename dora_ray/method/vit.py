"""VisionTransformer of timm, and the extra tensors that DoRA reads from one of its blocks.

Fused attention never materializes the (N + 1) x (N + 1) matrices. DoRA needs one row of them, for the first frame, in
one block, and that block's projections; they are computed here from the block's own weights.
Shapes: B clips, B' images, T frames, C channels, N patches, D width, H heads, K objects, S sequences, P tokens of all
sequences together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, TypeGuard, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.method.attention import Layout, project
from dora_ray.method.blocks import cls_of_block, cls_of_blocks, run_block
from dora_ray.method.precision import full_precision

Grid = tuple[int, int]
PositionInterpolation = Literal["antialiased", "released"]
# Standard deviation of timm's CLS token.
TIMM_CLS_STD = 1e-6


@dataclass(frozen=True)
class Features:
    """Outputs of an encoder for images, after its final norm.

    Attributes:
        cls: (B', D).
        patches: (B', N, D).
    """

    cls: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Tracked:
    """Features used to discover and track objects. Query and key have concatenated heads and exclude CLS.

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
    *,
    name: str,
    width: int,
    depth: int,
    num_heads: int,
    patch_size: int,
    image_size: int,
    drop_path: float,
    position_interpolation: PositionInterpolation = "antialiased",
    cls_token_std: float = TIMM_CLS_STD,
) -> VisionTransformer:
    """Build a randomly initialized ViT without classifier, for images of any multiple of the patch size.

    Args:
        name: timm architecture, such as "vit_small_patch16_224"; the sizes below override its own.
        width: D.
        depth: number of blocks.
        num_heads: H, a divisor of the width.
        patch_size: side of a patch, pixels.
        image_size: image side, in pixels, of the learned position embedding.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first.
        position_interpolation: see `_interpolation`; used by this module, while the model's own forward keeps timm's
            antialiased interpolation.
        cls_token_std: standard deviation of the CLS token's initial values.

    Raises:
        ConfigError: timm has no such model, or it is not a plain ViT.
    """
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}: name a ViT such as 'vit_small_patch16_224'")
    if width % num_heads:
        raise ConfigError(f"a width of {width} does not divide into {num_heads} heads: use a multiple of {num_heads}")
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
    if not is_plain(vit):
        raise ConfigError(f"{name!r} is not a plain ViT with queries and keys: use 'vit_small_patch16_224'")
    with torch.no_grad():
        cast(Tensor, vit.cls_token).mul_(cls_token_std / TIMM_CLS_STD)
    vit.__dict__["position_interpolation"] = position_interpolation
    return vit


def is_plain(vit: torch.nn.Module) -> TypeGuard[VisionTransformer]:
    """Return whether `embed` and `run_block` equal the model's own forward: CLS as the only prefix, plain blocks."""
    if not isinstance(vit, VisionTransformer):
        return False
    plain_tokens = vit.has_class_token and vit.num_prefix_tokens == 1 and vit.pos_embed is not None
    return (
        plain_tokens
        and not vit.no_embed_class
        and isinstance(vit.patch_embed.norm, torch.nn.Identity)
        # timm has attention gates since 1.0.28.
        and all(
            type(b) is Block and type(b.attn) is Attention and not getattr(b.attn, "gate", None) for b in vit.blocks
        )
    )


def image_features(vit: VisionTransformer, images: Tensor) -> Features:
    """Return CLS and patch tokens of images (B', C, H, W) after the final norm."""
    tokens = vit.forward_features(images)
    return Features(cls=tokens[:, 0], patches=tokens[:, 1:])


def cls_features(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Return CLS of images after the final norm, without the last block's outputs at other tokens.

    Args:
        vit: the encoder.
        images: (B', C, H, W).

    Returns:
        (B', D), equal to `image_features(vit, images).cls`.
    """
    return cls_of_blocks(vit, *whole_images(vit, images))


def whole_images(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, Layout]:
    """Return the tokens (P, D) of images (B', C, H, W), CLS first, and their layout."""
    tokens = embed(vit, images)
    return tokens.flatten(0, 1), _layout_of(tokens)


def kept_patches(vit: VisionTransformer, frames: Tensor, masks: Tensor) -> tuple[Tensor, Layout, Tensor]:
    """Return the tokens of object views that keep only the object's patches: shorter sequences instead of zeros.

    The naive loop::

            for each clip b, object i and frame t:
                tokens = embed(frames[b, t]); sequence = [CLS] + [tokens[n] for n in patches if masks[b, i, t, n] > 0]

    A patch keeps its position embedding. Sequences are sorted by length, so that equal lengths share an attention call
    where torch has no variable-length kernel. The host synchronizes once, for the lengths.

    Args:
        vit: the encoder.
        frames: (B, T, C, H, W).
        masks: (B, K, T, N), 0 where a patch is left out.

    Returns:
        The tokens (P, D), their layout, and for each of the B x K x T views, in the order of the masks, the position of
        its sequence, (S,) int64.
    """
    num_objects, num_frames = masks.shape[1:3]
    embedded = embed(vit, frames.flatten(0, 1))
    kept = F.pad(masks.flatten(0, 2) > 0, (1, 0), value=True)
    ordered, order = kept.sum(dim=1).sort(stable=True)
    lengths = ordered.tolist()
    rows, places = torch.nonzero_static(kept[order], size=sum(lengths)).unbind(1)
    frame = order // (num_objects * num_frames) * num_frames + order % num_frames
    # On a GPU, the backward of indexing adds in nondeterministic order; that of an embedding does not.
    tokens = F.embedding(frame[rows] * kept.shape[1] + places, embedded.flatten(0, 1))
    return tokens, Layout.of_lengths(lengths, tokens.device), order.argsort()


def tracked_features(vit: VisionTransformer, frames: Tensor, *, block: int) -> Tracked:
    """Run all frames of all clips through the encoder once, and extract what tracking needs from one block.

    Args:
        vit: the encoder.
        frames: (B, T, C, H, W).
        block: block whose projections give queries, keys and attention, counted from the end: -1 is the last.

    Raises:
        ValueError: there is no such block.
    """
    depth = len(vit.blocks)
    if not -depth <= block <= -1:
        raise ValueError(f"block={block}: blocks count from the end, use -{depth} to -1")
    num_clips, num_frames = frames.shape[:2]
    tokens, layout = whole_images(vit, frames.flatten(0, 1))
    by_frame = (num_clips, num_frames, -1)
    for index in range(depth):
        if index == depth + block:
            query0, key, cls_attention0 = _projections(_block(vit, block), torch.unflatten(tokens, 0, by_frame))
        if index < depth - 1:
            tokens = run_block(_block(vit, index), tokens, layout)
    last, tokens = _block(vit, -1), torch.unflatten(tokens, 0, by_frame)
    first = run_block(last, tokens[:, 0].flatten(0, 1), _layout_of(tokens[:, 0]))
    others = cls_of_block(last, tokens[:, 1:].flatten(0, 2), _layout_of(tokens[:, 1:].flatten(0, 1)))
    normalized = torch.unflatten(_normalize(vit, first), 0, (num_clips, -1))
    cls = [normalized[:, :1], torch.unflatten(_normalize(vit, others), 0, (num_clips, num_frames - 1))]
    return Tracked(torch.cat(cls, dim=1), normalized[:, 1:], query0, key, cls_attention0)


def masked_images(vit: VisionTransformer, frames: Tensor, masks: Tensor) -> tuple[Tensor, Layout]:
    """Return the tokens of object views that are 0, the mean color, outside the object (equation 5).

    The naive loop::

            for each clip b, object i and frame t: embed(frames[b, t] x masks[b, i, t], enlarged to pixels)

    Patch embedding is linear with a bias, so each frame is embedded once and its patches are masked: no masked pixels
    are materialized.

    Args:
        vit: the encoder.
        frames: (B, T, C, H, W) normalized frames.
        masks: (B, K, T, N) with the patches of a square grid in row-major order, 0 to 1.

    Returns:
        The tokens (P, D) of B x K x T views, and their layout.
    """
    by_clip = torch.unflatten(_patches(vit, frames.flatten(0, 1), with_bias=False), 0, frames.shape[:2]).unsqueeze(1)
    masked = (by_clip * masks.to(by_clip.dtype).unsqueeze(-1)).flatten(0, 2)
    bias = cast(torch.nn.Conv2d, vit.patch_embed.proj).bias
    tokens = _with_cls(vit, masked if bias is None else masked + bias, _grid(vit, frames))
    return tokens.flatten(0, 1), _layout_of(tokens)


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Embed images (B', C, H, W) of any multiple of the patch size as tokens (B', 1 + N, D) for the first block."""
    return _with_cls(vit, _patches(vit, images, with_bias=True), _grid(vit, images))


def _grid(vit: VisionTransformer, images: Tensor) -> Grid:
    """Return the number of patch rows and columns of images (..., H, W)."""
    side = cast(int, vit.patch_embed.patch_size[0])
    return images.shape[-2] // side, images.shape[-1] // side


def _patches(vit: VisionTransformer, images: Tensor, *, with_bias: bool) -> Tensor:
    """Embed images (B', C, H, W) as patches (B', N, D): timm's strided convolution as a matrix product."""
    projection = cast(torch.nn.Conv2d, vit.patch_embed.proj)
    (rows, columns), side = _grid(vit, images), projection.kernel_size[0]
    cells = torch.unflatten(torch.unflatten(images, 3, (columns, side)), 2, (rows, side)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(
        cells.flatten(3).flatten(1, 2), projection.weight.flatten(1), projection.bias if with_bias else None
    )


def _with_cls(vit: VisionTransformer, patches: Tensor, grid: Grid) -> Tensor:
    """Return tokens (B', 1 + N, D) from embedded patches (B', N, D): prepend CLS and add every token's position."""
    cls_token = cast(Tensor, vit.cls_token).expand(len(patches), -1, -1)
    rule = vit.__dict__.get("position_interpolation", "antialiased")
    positions = _positions(cast(Tensor, vit.pos_embed), vit.patch_embed.grid_size, grid, rule)
    tokens = torch.cat([cls_token, patches], dim=1) + positions
    embedded: Tensor = vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))
    return embedded


@full_precision
def _positions(pos_embed: Tensor, old: Grid, new: Grid, rule: PositionInterpolation) -> Tensor:
    """Interpolate the position embedding to another grid, (1, 1 + N, D).

    The kernel that timm uses has a backward that adds in nondeterministic order on a GPU, so equal runs would differ.
    The same interpolation as a product with a constant matrix is deterministic.
    """
    if old == new:
        return pos_embed
    matrix = _interpolation(old, new, rule, pos_embed.dtype, pos_embed.device)
    return torch.cat([pos_embed[:, :1], matrix @ pos_embed[:, 1:]], dim=1)


@functools.lru_cache(maxsize=16)
def _interpolation(
    old: Grid, new: Grid, rule: PositionInterpolation, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the matrix (new patches, old patches) of a bicubic interpolation between two grids.

    "antialiased" is timm's: along each side, patch i of n lies at (i + 1/2) old / n - 1/2 in the old grid. "released"
    is DINO's and the released DoRA's: not antialiased, and with n + 0.1 instead of n, which was added so that the size
    computed from the scale is not rounded down. From 14 patches to 7, it moves the last one by 0.18 of an old one.
    """
    num_old = old[0] * old[1]
    # A tensor created in inference mode cannot be used in a backward, and this one is cached.
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(num_old, dtype=torch.float64).view(num_old, 1, *old)
        if rule == "antialiased":
            columns = F.interpolate(units, size=new, mode="bicubic", antialias=True)
        else:
            scales = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
            columns = F.interpolate(units, scale_factor=scales, mode="bicubic", recompute_scale_factor=False)
            assert columns.shape[2:] == new
        return columns.flatten(1).T.contiguous().to(device=device, dtype=dtype)


def _block(vit: VisionTransformer, index: int) -> Block:
    return cast(Block, vit.blocks[index])


def _normalize(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    normalized: Tensor = vit.norm(tokens)
    return normalized


def _layout_of(tokens: Tensor) -> Layout:
    """Return the layout of sequences (S, n, D) of one length."""
    return Layout(((tokens.shape[0], tokens.shape[1]),), tokens.device)


def _projections(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query0 (B, N, D), key (B, T, N, D), cls_attention0 (B, H, N) of a block's input (B, T, 1 + N, D)."""
    attention = cast(Attention, block.attn)
    normalized = block.norm1(tokens)
    query0 = project(attention, normalized[:, 0], 0)
    key = project(attention, normalized, 1)
    row = _attention_row(query0[:, 0], key[:, 0])
    return query0[:, 1:].flatten(-2), key[:, :, 1:].flatten(-2), row[:, :, 1:]


@full_precision
def _attention_row(query: Tensor, key: Tensor) -> Tensor:
    """Return the softmax attention (B, H, n) of one query (B, H, d) to n keys (B, n, H, d)."""
    logits = torch.einsum("bhd,bnhd->bhn", query, key) * query.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1)
