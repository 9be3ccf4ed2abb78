"""Video object segmentation without training: the first frame's mask is carried on by like patches (DAVIS 2016).

Legend: T frames, H x W pixels, h x w patches, D width, C frames that labels come from, L labels (background, object).

Protocol (DINO's): frames of short side 480; patch tokens after the final norm, L2-normalized. A patch takes its label
from the 5 most similar patches at most 12 patches away, in the first frame and the 7 last ones, weighted by
exp(similarity / 0.1). Scored at the annotation's size, without the first and the last frame, as DAVIS does.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.evaluation.features import normalize
from dora_ray.evaluation.images import open_rgb, whole_size

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

LAYOUT = "FOLDER/JPEGImages/480p/SEQUENCE/00000.jpg and FOLDER/Annotations/480p/SEQUENCE/00000.png"
_TILE = 8  # side of what is compared at a time, patches
BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal


@dataclass(frozen=True)
class Sequence:
    """A sequence's frames and masks, one mask a frame."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]


def find_sequences(folder: str | os.PathLike[str]) -> list[Sequence]:
    """The sequences that have frames and masks, by name.

    Raises:
        ConfigError: Another layout, or a sequence with unequal numbers of frames and masks, or with fewer than 3.
    """
    images, annotations = Path(folder, "JPEGImages", "480p"), Path(folder, "Annotations", "480p")
    if not images.is_dir() or not annotations.is_dir():
        raise ConfigError(f"{folder} is not laid out as DAVIS: {LAYOUT}.")
    names = sorted(entry.name for entry in images.iterdir() if (annotations / entry.name).is_dir())
    if not names:
        raise ConfigError(f"{folder} holds no sequence with frames and masks: {LAYOUT}.")
    found = []
    for name in names:
        frames, masks = tuple(sorted((images / name).glob("*.jpg"))), tuple(sorted((annotations / name).glob("*.png")))
        if [path.stem for path in frames] != [path.stem for path in masks] or len(frames) < 3:
            raise ConfigError(
                f"{images / name} has {len(frames)} frames and {len(masks)} masks: a mask for each frame is needed, "
                "and 3 frames or more."
            )
        found.append(Sequence(name, frames, masks))
    return found


def read_mask(path: Path) -> np.ndarray:
    """A mask as (H, W) bool: every object together is the object.

    Raises:
        ConfigError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in ("L", "P", "1") else image.convert("L")) > 0
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a mask ({error}). Repair or remove it.") from error


def propagate(
    features: Tensor, labels: Tensor, target: Tensor, *, radius: int, num_neighbors: int, temperature: float
) -> Tensor:
    """Labels of a frame's patches from those of earlier frames.

        for each patch p of the target:
            near = patches of the context frames at most `radius` rows and columns from p
            best = the num_neighbors of them with the largest <feature, target[p]>
            label[p] = mean of their labels, weighted by exp(<feature, target[p]> / temperature)

    Args:
        features: (C, h, w, D) of the context frames, L2-normalized.
        labels: (C, h, w, L) shares of each label.
        target: (h, w, D), L2-normalized.
        radius: In patches.
        num_neighbors: Fewer at the border of very small frames.
        temperature: Of the weights.

    Returns:
        (h, w, L), each patch summing to 1 where the labels do.
    """
    height, width, num_labels = *target.shape[:2], labels.shape[-1]
    result = labels.new_zeros(height, width, num_labels)
    # Tiles, because comparing a whole frame with all it could look at would mostly be thrown away.
    for y, x in itertools.product(range(0, height, _TILE), range(0, width, _TILE)):
        tile = target[y : y + _TILE, x : x + _TILE]
        top, left = max(0, y - radius), max(0, x - radius)
        window = (slice(None), slice(top, y + _TILE + radius), slice(left, x + _TILE + radius))
        near, near_labels = features[window], labels[window].flatten(0, 2)
        similarity = torch.einsum("abd,cyxd->abcyx", tile, near)
        far_rows = _far(y, tile.shape[0], top, near.shape[1], radius=radius, device=target.device)
        far_columns = _far(x, tile.shape[1], left, near.shape[2], radius=radius, device=target.device)
        far = far_rows[:, None, None, :, None] | far_columns[None, :, None, None, :]
        similarity = similarity.masked_fill_(far, -torch.inf).flatten(2)
        best, index = similarity.topk(min(num_neighbors, similarity.shape[-1]), dim=-1)
        weights = torch.softmax(best / temperature, dim=-1)
        result[y : y + _TILE, x : x + _TILE] = torch.einsum("abn,abnl->abl", weights, near_labels[index])
    return result


def _far(start: int, length: int, near_start: int, near_length: int, *, radius: int, device: torch.device) -> Tensor:
    """(length, near_length) bool: whether two positions along one axis are more than the radius apart."""
    ours = torch.arange(start, start + length, device=device)
    theirs = torch.arange(near_start, near_start + near_length, device=device)
    return (ours[:, None] - theirs[None, :]).abs() > radius


def segment(
    features: Iterator[Tensor],
    first_mask: np.ndarray,
    *,
    num_frames: int,
    radius: int,
    num_neighbors: int,
    temperature: float,
) -> Iterator[np.ndarray]:
    """Masks of all frames but the first.

    Args:
        features: T of (h, w, D), L2-normalized.
        first_mask: (H, W) bool.
        num_frames: Earlier frames beside the first that labels come from.
        radius: As `propagate`.
        num_neighbors: As `propagate`.
        temperature: As `propagate`.

    Yields:
        T - 1 of (H, W) bool.
    """
    first = next(features)
    share = np.asarray(Image.fromarray(first_mask).resize((first.shape[1], first.shape[0]), Image.Resampling.NEAREST))
    foreground = torch.from_numpy(share.astype(np.float32)).to(first.device)
    labels = torch.stack([1 - foreground, foreground], dim=-1)
    context = [(first, labels)]
    for target in features:
        earlier, earlier_labels = (torch.stack(part) for part in zip(*context, strict=True))
        settings = {"radius": radius, "num_neighbors": num_neighbors}
        labels = propagate(earlier, earlier_labels, target, **settings, temperature=temperature)
        yield enlarge_labels(labels, height=first_mask.shape[0], width=first_mask.shape[1])
        context = [context[0], *[*context[1:], (target, labels)][-num_frames:]]


def enlarge_labels(labels: Tensor, *, height: int, width: int) -> np.ndarray:
    """(h, w, 2) shares to an (H, W) bool mask: both enlarged, stretched to [0, 1], the larger one wins."""
    size = (height, width)
    large = F.interpolate(labels.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    stretched = (large - low) / (high - low).clamp_min(1e-6)
    return (stretched[1] > stretched[0]).cpu().numpy()


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two (H, W) bool masks; 1 where both are empty."""
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """F: harmonic mean of the shares of each (H, W) mask's boundary within 0.8 % of the diagonal of the other's."""
    tolerance = int(np.ceil(BOUNDARY_TOLERANCE * np.hypot(*mask.shape)))
    ours, theirs = boundary(mask), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & dilate(theirs, radius=tolerance)).sum() / ours.sum()
    recall = (theirs & dilate(ours, radius=tolerance)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask (H, W) bool that differ from the right, the lower or the lower right neighbor."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def dilate(mask: np.ndarray, *, radius: int) -> np.ndarray:
    """All pixels at most `radius` from a pixel of the mask (H, W) bool."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for dy in range(-radius, radius + 1):
        reach = int(np.sqrt(radius**2 - dy**2))
        sums = np.pad(np.pad(mask, ((0, 0), (reach, reach))).cumsum(axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        wide = sums[:, 2 * reach + 1 :] > sums[:, :width]
        rows = slice(max(0, dy), height + min(0, dy))
        result[rows] |= wide[max(0, -dy) : height - max(0, dy)]
    return result


def frame_features(vit: VisionTransformer, path: Path, *, short_side: int, device: str) -> Tensor:
    """One frame's patch tokens after the final norm, L2-normalized: (h, w, D)."""
    patch = int(vit.patch_embed.patch_size[0])
    image = open_rgb(path)
    width, height = whole_size(image.size, short_side=short_side, patch_size=patch)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    tokens = vit.forward_features(normalize(torch.from_numpy(pixels.copy())[None].to(device)))
    grid = tokens[0, vit.num_prefix_tokens :].unflatten(0, (height // patch, width // patch))
    return F.normalize(grid.float(), dim=-1)


@torch.inference_mode()
def evaluate_vos(
    backbone: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    short_side: int,
    num_frames: int,
    radius: int,
    num_neighbors: int,
    temperature: float,
    max_frames: int | None,
    device: str,
) -> dict[str, Any]:
    """Label propagation on every sequence of a folder laid out as DAVIS 2016.

    Args:
        backbone: On `device`, in evaluation mode.
        data: The folder.
        short_side: Of the frames that the encoder sees, pixels.
        num_frames: As `segment`.
        radius: As `propagate`.
        num_neighbors: As `propagate`.
        temperature: As `propagate`.
        max_frames: Of each sequence, from its start; None: all.
        device: Where the encoder and the propagation run.

    Returns:
        j_mean, f_mean and j_and_f, means over sequences of means over frames, in [0, 1]; and both for each sequence.

    Raises:
        ConfigError: As `find_sequences`, or a frame or mask that cannot be read.
    """
    sequences = {}
    for sequence in find_sequences(data):
        frames, masks = sequence.frames[:max_frames], sequence.masks[:max_frames]
        features = (frame_features(backbone, path, short_side=short_side, device=device) for path in frames)
        found = segment(
            features,
            read_mask(masks[0]),
            num_frames=num_frames,
            radius=radius,
            num_neighbors=num_neighbors,
            temperature=temperature,
        )
        pairs = [(mask, read_mask(path)) for mask, path in zip(found, masks[1:], strict=True)][:-1]
        sequences[sequence.name] = {
            "j": float(np.mean([region_similarity(*pair) for pair in pairs])),
            "f": float(np.mean([boundary_accuracy(*pair) for pair in pairs])),
            "num_frames": len(frames),
        }
    j_mean, f_mean = (float(np.mean([scores[name] for scores in sequences.values()])) for name in ("j", "f"))
    return {"j_and_f": (j_mean + f_mean) / 2, "j_mean": j_mean, "f_mean": f_mean, "sequences": sequences}
