"""Evaluation of the method's own object masks: discovery and tracking of labeled objects.

Legend: B clips, T frames, K masks, M true objects, P pixels, H heads, h x w patches.

object_iou: the K masks of a clip's first frame are matched one-to-one with its M true objects so that the sum of
intersections over union is maximal. An object without a mask counts as 0. Mean over objects, then over clips.
tracking_iou: keeps the pairs of the first frame. For each object, the mean over the later frames that show it; then
mean over objects, then over clips.
Both rise with the number and area of the masks, so compare them with two chance levels: as many masks of equal area at
random patches (random_masks), and the same masks shifted by half a frame in both directions (moved_masks).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.evaluation.features import Progress, normalize
from dora_ray.evaluation.images import whole_size
from dora_ray.evaluation.labeled_clips import batched_clips, find_clips
from dora_ray.method.objects import track_objects
from dora_ray.method.tracking import Threshold, random_masks
from dora_ray.method.vit import tracked_features

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

BATCH_SIZE = 16
SCORES = ("object_iou", "tracking_iou")
Scores = dict[str, float]


def mask_overlaps(masks: Tensor, truths: Tensor) -> Tensor:
    """Return the intersections over union (K, M) of masks (K, P) and true objects (M, P), bool; 0 if both are empty."""
    first, second = masks.float(), truths.float()
    shared = first @ second.T
    union = first.sum(dim=1, keepdim=True) + second.sum(dim=1) - shared
    return shared / union.clamp_min(1)


def best_assignment(scores: Sequence[Sequence[float]]) -> list[int | None]:
    """Match rows and columns one-to-one so that the sum of the scores is maximal.

    Uses the Hungarian method with potentials (Kuhn 1955; shortest augmenting paths).

    Args:
        scores: (K, M).

    Returns:
        The row of each of the M columns; None for a column without a row, if there are fewer rows than columns.
    """
    num_rows, num_columns = len(scores), len(scores[0]) if len(scores) else 0
    if num_rows > num_columns:
        columns = best_assignment([list(column) for column in zip(*scores, strict=True)]) if num_columns else []
        rows: list[int | None] = [None] * num_columns
        for row, column in enumerate(columns):
            if column is not None:
                rows[column] = row
        return rows
    return [None if row == 0 else row - 1 for row in _rows_of_columns(scores)[1:]]


def _rows_of_columns(scores: Sequence[Sequence[float]]) -> list[int]:
    """Match every row; needs at least as many columns. Both count from 1: index 0 is internal, value 0 means none."""
    num_rows, num_columns = len(scores), len(scores[0])
    of_row, of_column = [0.0] * (num_rows + 1), [0.0] * (num_columns + 1)
    row_of = [0] * (num_columns + 1)
    for start in range(1, num_rows + 1):
        row_of[0], column = start, 0
        least, before = [float("inf")] * (num_columns + 1), [0] * (num_columns + 1)
        reached = [False] * (num_columns + 1)
        while row_of[column]:
            reached[column] = True
            row, step, following = row_of[column], float("inf"), 0
            for j in range(1, num_columns + 1):
                if reached[j]:
                    continue
                slack = -scores[row - 1][j - 1] - of_row[row] - of_column[j]
                if slack < least[j]:
                    least[j], before[j] = slack, column
                if least[j] < step:
                    step, following = least[j], j
            for j in range(num_columns + 1):
                if reached[j]:
                    of_row[row_of[j]] += step
                    of_column[j] -= step
                else:
                    least[j] -= step
            column = following
        while column:
            row_of[column] = row_of[before[column]]
            column = before[column]
    return row_of


def clip_scores(masks: Tensor, ids: Tensor, *, least_area: float) -> tuple[float, float | None] | None:
    """Score one clip's masks.

    Args:
        masks: (K, T, P) bool.
        ids: (T, P) integers: true object of each pixel, 0 for the background.
        least_area: Objects that cover less than this share of a frame are ignored in it.

    Returns:
        object_iou and tracking_iou, the latter None if no object of the first frame is visible again; None if the first
        frame shows no object.
    """
    least = least_area * ids.shape[-1]
    known = [
        number for number in torch.unique(ids[0]).tolist() if number and int((ids[0] == number).sum()) >= max(least, 1)
    ]
    if not known:
        return None
    first = mask_overlaps(masks[:, 0], torch.stack([ids[0] == number for number in known]))
    pairs = best_assignment(first.tolist())
    found = [0.0 if row is None else float(first[row, column]) for column, row in enumerate(pairs)]
    followed = [_follow(masks, ids, number, row, least) for number, row in zip(known, pairs, strict=True)]
    seen = [value for value in followed if value is not None]
    return float(np.mean(found)), (float(np.mean(seen)) if seen else None)


def _follow(masks: Tensor, ids: Tensor, number: int, row: int | None, least: float) -> float | None:
    """Return the mean overlap of mask `row` with an object over the later frames that show it; None if none does."""
    values = []
    for frame in range(1, len(ids)):
        truth = ids[frame] == number
        if int(truth.sum()) < max(least, 1):
            continue
        values.append(0.0 if row is None else float(mask_overlaps(masks[row : row + 1, frame], truth[None])))
    return float(np.mean(values)) if values else None


def enlarge_masks(masks: Tensor, *, size: tuple[int, ...]) -> Tensor:
    """Upsample masks (B, K, T, h, w) in [0, 1] to pixels (B, K, T, H W) by nearest neighbor; True above 1/2."""
    large = F.interpolate(masks.flatten(0, 1).float(), size=size, mode="nearest-exact")
    return torch.unflatten(large > 0.5, 0, masks.shape[:2]).flatten(-2)


@torch.inference_mode()
def evaluate_objects(
    backbone: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    image_size: int,
    num_frames: int,
    stride: int,
    num_draws: int,
    max_clips: int | None,
    least_area: float,
    draw_seed: int,
    num_objects: int,
    block: int,
    normalize_patches: bool,
    num_iterations: int,
    epsilon: float,
    threshold: Threshold,
    device: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the objects that the encoder discovers and tracks in labeled clips, as in a training step.

    Args:
        backbone: On `device`, in evaluation mode.
        data: As `find_clips`.
        image_size: Short side of the encoder's input, pixels; frames are not cropped.
        num_frames: T.
        stride: Step between the frames of a clip, in labeled frames.
        num_draws: Number of draws of heads per clip; the clip's scores are means over them.
        max_clips: As `find_clips`.
        least_area: As `clip_scores`.
        draw_seed: Seed of the heads and the random masks.
        num_objects: K, at most the encoder's number of heads.
        block: As `tracked_features`.
        normalize_patches: As `track_objects`.
        num_iterations: As `track_objects`.
        epsilon: As `track_objects`.
        threshold: As `track_objects`.
        device: Where the encoder runs.
        progress: Called with the number of clips done and the total.

    Returns:
        object_iou and tracking_iou, each with two chance levels (..._random_masks and ..._moved_masks), num_clips, and
        samples: the scores of each clip.

    Raises:
        ConfigError: As `find_clips`, or more objects than heads, or no clip shows an object in its first frame.
    """
    num_heads = int(cast(Any, backbone.blocks[0]).attn.num_heads)
    if num_objects > num_heads:
        raise ConfigError(f"num_objects={num_objects}: use 1 to {num_heads}, the encoder's attention heads.")
    rng = np.random.default_rng(draw_seed)
    tracking: dict[str, Any] = {
        "normalize_patches": normalize_patches,
        "num_iterations": num_iterations,
        "epsilon": epsilon,
    }
    clips = find_clips(data, num_frames=num_frames, stride=stride, max_clips=max_clips)
    rows: list[Scores] = []
    done = 0
    for frames, ids in batched_clips(clips, batch_size=BATCH_SIZE):
        images = _as_images(backbone, frames, image_size=image_size, device=device)
        tracked = tracked_features(backbone, images, block=block)
        grid = tuple(side // int(backbone.patch_embed.patch_size[0]) for side in images.shape[-2:])
        truths = torch.from_numpy(ids).flatten(2).to(device)
        drawn: list[list[Scores]] = [[] for _ in frames]
        for _ in range(num_draws):
            heads = np.stack([rng.permutation(num_heads)[:num_objects] for _ in frames])
            found = track_objects(tracked, torch.from_numpy(heads).to(device), threshold=threshold, **tracking)
            noise = torch.from_numpy(rng.random(found.masks.shape, dtype=np.float32)).to(device)
            kinds = with_chances(found.masks, noise, grid=grid, size=ids.shape[2:])
            for number, row in enumerate(drawn):
                of_clip = {kind: masks[number] for kind, masks in kinds.items()}
                row.extend(_scores(of_clip, truths[number], least_area))
        rows += [_mean(scores) for scores in drawn if scores]
        done += len(frames)
        if progress is not None:
            progress(done, len(clips))
    if not rows:
        raise ConfigError(f"{data}: no clip's first frame shows an object of at least {least_area:.1%} of the frame")
    samples = {name: [row[name] for row in rows if name in row] for name in SCORES}
    means = _mean(rows)
    return means | {"num_clips": len(rows), "samples": samples}


def with_chances(masks: Tensor, noise: Tensor, *, grid: tuple[int, ...], size: tuple[int, ...]) -> dict[str, Tensor]:
    """Return masks (B, K, T, N) of h x w patches and their two chance levels as pixels (B, K, T, H W), by suffix."""
    moved = torch.unflatten(masks, -1, grid).roll((grid[0] // 2, grid[1] // 2), (-2, -1))
    kinds = {
        "": torch.unflatten(masks, -1, grid),
        "_random_masks": torch.unflatten(random_masks(masks, noise), -1, grid),
        "_moved_masks": moved,
    }
    return {kind: enlarge_masks(part, size=size) for kind, part in kinds.items()}


def _as_images(vit: VisionTransformer, frames: np.ndarray, *, image_size: int, device: str) -> Tensor:
    """Resize frames (B, T, H, W, 3) uint8 to this short side in whole patches, and normalize: (B, T, 3, H', W')."""
    size = (frames.shape[3], frames.shape[2])
    width, height = whole_size(size, short_side=image_size, patch_size=int(vit.patch_embed.patch_size[0]))
    small = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        for frame in frames.reshape(-1, *frames.shape[2:])
    ]
    return torch.unflatten(normalize(torch.from_numpy(np.stack(small)).to(device)), 0, frames.shape[:2])


def _scores(kinds: dict[str, Tensor], ids: Tensor, least_area: float) -> list[Scores]:
    """Return a list with one clip's available scores by name; empty for a clip without objects."""
    row: Scores = {}
    for kind, masks in kinds.items():
        found = clip_scores(masks, ids, least_area=least_area)
        if found is None:
            return []
        row |= {f"{name}{kind}": value for name, value in zip(SCORES, found, strict=True) if value is not None}
    return [row]


def _mean(rows: Sequence[Scores]) -> Scores:
    """Average each score over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
