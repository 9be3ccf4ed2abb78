"""Video object segmentation without training: propagate the first frame's masks by patch similarity (DAVIS).

Legend: T frames, H x W pixels, h x w patches, D width, K objects.

Protocol (DINO's): frames of short side 480; patch tokens after the final norm, L2-normalized. A patch takes its label
from the 5 most similar patches at most 12 patches away, in the first frame and the 7 last ones, weighted by
exp(similarity / 0.1). Scored at the annotation's size, without the first and the last frame; J and F are means over an
object's frames, then over all objects of all sequences, as DAVIS does.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.evaluation.contours import boundary_accuracy, region_similarity, statistics
from dora_ray.evaluation.davis import Objects, Sequence, choose_sequences, find_sequences, read_mask, read_masks
from dora_ray.evaluation.features import Progress, normalize, report_unreadable
from dora_ray.evaluation.images import open_rgb, whole_size
from dora_ray.evaluation.propagation import segment

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["evaluate_vos", "find_sequences", "read_mask"]

Carry = Callable[[Iterator[Tensor], np.ndarray], Iterator[np.ndarray]]
_SHAPE_SLACK = 0.02  # tolerance for rounding, as a relative difference of width / height


def frame_features(vit: VisionTransformer, path: Path, *, short_side: int, device: str) -> Tensor:
    """Return one frame's patch tokens after the final norm, L2-normalized: (h, w, D)."""
    patch = int(vit.patch_embed.patch_size[0])
    image = open_rgb(path)
    width, height = whole_size(image.size, short_side=short_side, patch_size=patch)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    tokens = vit.forward_features(normalize(torch.from_numpy(pixels.copy())[None].to(device)))
    grid = torch.unflatten(tokens[0, vit.num_prefix_tokens :], 0, (height // patch, width // patch))
    return F.normalize(grid.float(), dim=-1)


@torch.inference_mode()
def evaluate_vos(
    backbone: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    year: str | None,
    short_side: int,
    num_frames: int,
    radius: int,
    num_neighbors: int,
    temperature: float,
    max_frames: int | None,
    device: str,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate label propagation on the sequences of a folder in the DAVIS layout.

    Args:
        backbone: On `device`, in evaluation mode.
        data: The folder.
        year: As `choose_sequences`; "2016" also scores all objects of a sequence as one.
        short_side: Short side of the encoder's input, pixels.
        num_frames: As `segment`.
        radius: As `propagate`.
        num_neighbors: As `propagate`.
        temperature: As `propagate`.
        max_frames: Frames of each sequence, from its start; None: all.
        device: Device of the encoder and the propagation.
        skip_unreadable: Skip sequences with a frame or mask that cannot be read or scored, with a warning.
        progress: Called with the number of frames done and the total.

    Returns:
        j_and_f; j_mean, j_recall, j_decay and the same for f, means over objects, in [0, 1]; still_*: the baseline that
        repeats the first mask; averaged: description of the sequences and objects averaged over; and the scores of each
        sequence and object.

    Raises:
        ConfigError: As `choose_sequences`, or a frame or mask cannot be read or scored.
    """
    chosen = choose_sequences(data, year=year)
    done, total = 0, sum(len(sequence.frames[:max_frames]) for sequence in chosen.sequences)

    def encode(path: Path) -> Tensor:
        nonlocal done
        found = frame_features(backbone, path, short_side=short_side, device=device)
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    carry = functools.partial(
        segment, num_frames=num_frames, radius=radius, num_neighbors=num_neighbors, temperature=temperature
    )
    scored: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    for sequence in chosen.sequences:
        part = Sequence(sequence.name, sequence.frames[:max_frames], sequence.masks[:max_frames])
        try:
            scored[sequence.name] = score_sequence(part, encode, carry, together=year == "2016")
        except ConfigError as error:
            failures.append(" ".join(_all_unreadable(part)) or str(error))
    report_unreadable(failures, len(chosen.sequences), skip_unreadable=skip_unreadable)
    return _means(scored, chosen.averaged, num_left_out=len(failures))


def _all_unreadable(sequence: Sequence) -> list[str]:
    """Return a message for every unreadable file of a sequence; scoring itself stops at the first one."""
    found = []
    readers: tuple[tuple[Callable[[Path], Any], tuple[Path, ...]], ...] = (
        (open_rgb, sequence.frames),
        (read_mask, sequence.masks),
    )
    for read, paths in readers:
        for path in paths:
            try:
                read(path)
            except ConfigError as error:
                found.append(str(error))
    return found


def score_sequence(
    sequence: Sequence, encode: Callable[[Path], Tensor], carry: Carry, *, together: bool
) -> dict[str, Any]:
    """Propagate a sequence's first mask, and score each object.

    Args:
        sequence: Frames and masks.
        encode: Maps a frame's file to (h, w, D), L2-normalized.
        carry: Maps the features of all frames and the first masks (K, H, W) to the masks of the other frames.
        together: Treat all objects as one.

    Returns:
        j, f (means over objects), num_frames, and objects: for each the statistics of j and f, and those of the
        baseline that repeats the first mask.

    Raises:
        ConfigError: A frame or mask cannot be read or scored.
    """
    masks = read_masks(sequence.masks)
    _check_shapes(sequence, masks)
    objects = Objects.of(masks[0], sequence.masks[0], together=together)
    first, scored = objects.split(masks[0]), masks[1:-1]
    if not any(objects.split(mask).any() for mask in scored):
        raise ConfigError(
            f"{sequence.masks[0].parent}: no object of the first mask ({', '.join(objects.names)}) appears in a scored "
            "later mask; all masks must use the same object numbers."
        )
    values: list[dict[str, list[float]]] = [defaultdict(list) for _ in objects.names]
    for found, mask in zip(carry(_alike(sequence, encode), first), [*scored, None], strict=True):
        if mask is not None:
            seen, truth = ~objects.void(mask), objects.split(mask)
            for k, measures in enumerate(values):
                _measure(measures, truth[k], found=found[k] & seen, still=first[k] & seen)
    scores = {
        name: {f"{key}_{word}": value for key in measures for word, value in statistics(measures[key]).items()}
        for name, measures in zip(objects.names, values, strict=True)
    }
    return {
        "j": float(np.mean([score["j_mean"] for score in scores.values()])),
        "f": float(np.mean([score["f_mean"] for score in scores.values()])),
        "num_frames": len(sequence.frames),
        "objects": scores,
    }


def _measure(measures: dict[str, list[float]], truth: np.ndarray, *, found: np.ndarray, still: np.ndarray) -> None:
    """Add one object's J and F in one frame: for the propagated mask (H, W) bool and for the first one."""
    for prefix, mask in (("", found), ("still_", still)):
        measures[f"{prefix}j"].append(region_similarity(mask, truth))
        measures[f"{prefix}f"].append(boundary_accuracy(mask, truth))


def _alike(sequence: Sequence, encode: Callable[[Path], Tensor]) -> Iterator[Tensor]:
    """Yield the features of the frames.

    Raises:
        ConfigError: A frame's size differs from the first one's.
    """
    first: Tensor | None = None
    for path in sequence.frames:
        features = encode(path)
        first = features if first is None else first
        if features.shape != first.shape:
            raise ConfigError(f"{path} differs in size from {sequence.frames[0]}; all frames must have one size.")
        yield features


def _check_shapes(sequence: Sequence, masks: list[np.ndarray]) -> None:
    """Check, before anything is computed, that all masks have one size and the frames their aspect ratio.

    Raises:
        ConfigError: A file differs; the message names it.
    """
    height, width = masks[0].shape
    for path, mask in zip(sequence.masks, masks, strict=True):
        if mask.shape != (height, width):
            raise ConfigError(
                f"{path} has {mask.shape[1]}x{mask.shape[0]} pixels, but the sequence's first mask {width}x{height}."
            )
    path, size = sequence.frames[0], open_rgb(sequence.frames[0]).size
    if abs(size[0] / size[1] / (width / height) - 1) > _SHAPE_SLACK:
        raise ConfigError(f"{path} has {size[0]}x{size[1]} pixels, but its mask another shape, {width}x{height}.")


def _means(scored: dict[str, dict[str, Any]], averaged: str, *, num_left_out: int) -> dict[str, Any]:
    """Return the means over all objects of all sequences, and each sequence's own scores."""
    objects = [score for sequence in scored.values() for score in sequence["objects"].values()]
    means = {name: float(np.mean([score[name] for score in objects])) for name in objects[0]}
    left_out = f", {num_left_out} left out" if num_left_out else ""
    return {
        "j_and_f": (means["j_mean"] + means["f_mean"]) / 2,
        **{name: value for name, value in means.items() if not name.startswith("still_")},
        "still_j_and_f": (means["still_j_mean"] + means["still_f_mean"]) / 2,
        "still_j_mean": means["still_j_mean"],
        "still_f_mean": means["still_f_mean"],
        "averaged": f"{averaged}{left_out}, {len(objects)} objects",
        "num_objects": len(objects),
        "sequences": scored,
    }
