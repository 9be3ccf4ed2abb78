"""Do the method's own object masks show the objects that are there, and follow them?

Legend: B clips, T frames, K masks, M true objects, P pixels, H heads, h x w patches.

object_iou: the K masks of a clip's first frame are matched with its M true objects, each with one at most, so that the
sum of the intersections over union is largest. An object without a mask counts 0. Mean over objects, then over clips.
tracking_iou: the pairs of the first frame are kept. Mean over the objects of their mean over the later frames that
show them, then over clips.
Both rise with the number and the area of the masks, so they are read beside their chance: as many masks of the same
areas at random patches (random_masks), and the same masks moved by half a frame down and across (moved_masks).
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
    """Intersections over union of masks (K, P) and true objects (M, P), bool: (K, M) float32, 0 of two empty ones."""
    first, second = masks.float(), truths.float()
    shared = first @ second.T
    union = first.sum(dim=1, keepdim=True) + second.sum(dim=1) - shared
    return shared / union.clamp_min(1)


def best_assignment(scores: Sequence[Sequence[float]]) -> list[int | None]:
    """Match rows and columns, each with one at most, so that the sum of the scores is largest.

    The Hungarian method with potentials (Kuhn 1955; shortest augmenting paths).

    Args:
        scores: (K, M).

    Returns:
        The row of each of the M columns; None where there are fewer rows than columns and it has none.
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
    """Match each row, with as many columns or more; index 0 is the method's own, rows count from 1, 0 means none."""
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
        ids: (T, P) integers: the true object of each pixel, 0 for none.
        least_area: Objects that cover less than this share of a frame are left out there.

    Returns:
        object_iou and tracking_iou, the latter None where no object of the first frame is seen again; None where the
        first frame shows no object.
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
    """Mean overlap of mask `row` with an object over the later frames that show it; None where none does."""
    values = []
    for frame in range(1, len(ids)):
        truth = ids[frame] == number
        if int(truth.sum()) < max(least, 1):
            continue
        values.append(0.0 if row is None else float(mask_overlaps(masks[row : row + 1, frame], truth[None])))
    return float(np.mean(values)) if values else None


def enlarge_masks(masks: Tensor, *, size: tuple[int, ...]) -> Tensor:
    """Masks (B, K, T, h, w) in [0, 1] to bool pixels (B, K, T, H W): a pixel is its patch's, where that is over 1/2."""
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
    """Score the objects that the encoder discovers and tracks in labeled clips, as a training step does.

    Args:
        backbone: On `device`, in evaluation mode.
        data: As `find_clips`.
        image_size: Short side of the frames that the encoder sees, pixels; they are seen whole.
        num_frames: T.
        stride: Labeled frames from one frame of a clip to the next.
        num_draws: Times that heads are drawn for each clip; its scores are their means.
        max_clips: As `find_clips`.
        least_area: As `clip_scores`.
        draw_seed: Of the drawn heads and of the random masks.
        num_objects: K; at most the encoder's heads.
        block: As `tracked_features`.
        normalize_patches: As `track_objects`.
        num_iterations: As `track_objects`.
        epsilon: As `track_objects`.
        threshold: As `track_objects`.
        device: Where the encoder runs.
        progress: Told the number of clips that are done, and of all.

    Returns:
        object_iou and tracking_iou, each with its two chances (..._random_masks and ..._moved_masks), num_clips, and
        samples: the scores' values of each clip.

    Raises:
        ConfigError: As `find_clips`, or more objects than heads, or no clip shows an object at its beginning.
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
        raise ConfigError(f"{data}: no clip shows an object of {least_area:.1%} of the frame at its beginning")
    samples = {name: [row[name] for row in rows if name in row] for name in SCORES}
    means = _mean(rows)
    return means | {"num_clips": len(rows), "samples": samples}


def with_chances(masks: Tensor, noise: Tensor, *, grid: tuple[int, ...], size: tuple[int, ...]) -> dict[str, Tensor]:
    """Put the two chances beside masks (B, K, T, N) of h x w patches: bool pixels (B, K, T, H W) by suffix."""
    moved = torch.unflatten(masks, -1, grid).roll((grid[0] // 2, grid[1] // 2), (-2, -1))
    kinds = {
        "": torch.unflatten(masks, -1, grid),
        "_random_masks": torch.unflatten(random_masks(masks, noise), -1, grid),
        "_moved_masks": moved,
    }
    return {kind: enlarge_masks(part, size=size) for kind, part in kinds.items()}


def _as_images(vit: VisionTransformer, frames: np.ndarray, *, image_size: int, device: str) -> Tensor:
    """Whole frames (B, T, H, W, 3) uint8, of that short side in whole patches, normalized: (B, T, 3, H', W')."""
    size = (frames.shape[3], frames.shape[2])
    width, height = whole_size(size, short_side=image_size, patch_size=int(vit.patch_embed.patch_size[0]))
    small = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        for frame in frames.reshape(-1, *frames.shape[2:])
    ]
    return torch.unflatten(normalize(torch.from_numpy(np.stack(small)).to(device)), 0, frames.shape[:2])


def _scores(kinds: dict[str, Tensor], ids: Tensor, least_area: float) -> list[Scores]:
    """Give one clip's scores by name, without those that it does not have; nothing for a clip without objects."""
    row: Scores = {}
    for kind, masks in kinds.items():
        found = clip_scores(masks, ids, least_area=least_area)
        if found is None:
            return []
        row |= {f"{name}{kind}": value for name, value in zip(SCORES, found, strict=True) if value is not None}
    return [row]


def _mean(rows: Sequence[Scores]) -> Scores:
    """Mean of each score over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
