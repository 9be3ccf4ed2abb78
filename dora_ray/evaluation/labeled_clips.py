"""Labeled clips: frames and object masks in the layout of DAVIS 2017 and `data synth tour`.

Legend: T frames, H x W pixels of a frame.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dora_ray.errors import ConfigError
from dora_ray.evaluation.davis import VOID, read_masks
from dora_ray.evaluation.images import open_rgb

LAYOUT = "FOLDER/JPEGImages/480p/SEQUENCE/00000.jpg and FOLDER/Annotations/480p/SEQUENCE/00000.png, or a tour's folder"


@dataclass(frozen=True)
class ClipFiles:
    """Files of one clip: T frames and T masks."""

    frames: tuple[Path, ...]
    masks: tuple[Path, ...]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read frames (T, H, W, 3) uint8 and object ids (T, H, W) uint8, 0 for the background.

        Raises:
            ConfigError: A file cannot be read, or the sizes differ.
        """
        frames = [np.asarray(open_rgb(path)) for path in self.frames]
        ids = _read_ids(self.masks)
        sizes = {picture.shape[:2] for picture in (*frames, *ids)}
        if len(sizes) > 1:
            raise ConfigError(f"{self.frames[0].parent}: frames and masks must have one size, but have {sorted(sizes)}")
        return np.stack(frames), np.stack(ids)


def find_clips(
    folder: str | os.PathLike[str], *, num_frames: int, stride: int, max_clips: int | None
) -> list[ClipFiles]:
    """Find non-overlapping clips of `num_frames` labeled frames, `stride` labeled frames apart.

    Args:
        folder: Folder in the DAVIS layout, or a tour, which has one in its subfolder davis.
        num_frames: T.
        stride: Step in labeled frames; 1 takes every one.
        max_clips: Number of clips, evenly spaced over all; None: all.

    Raises:
        ConfigError: The layout is unknown, a frame has no mask, or no sequence is long enough.
    """
    root = davis_folder(folder)
    images, annotations = root / "JPEGImages" / "480p", root / "Annotations" / "480p"
    if not images.is_dir() or not annotations.is_dir():
        raise ConfigError(f"{folder} has no labeled clips. They are laid out as {LAYOUT}.")
    found = [clip for name in _sequence_names(root, images) for clip in _cut(images / name, num_frames, stride)]
    if not found:
        raise ConfigError(
            f"{folder} has no sequence of {1 + (num_frames - 1) * stride} labeled frames: lower num_frames or stride"
        )
    clips = [ClipFiles(tuple(part), tuple(_mask_of(path, images, annotations) for path in part)) for part in found]
    if max_clips is None or max_clips >= len(clips):
        return clips
    return [clips[number * len(clips) // max_clips] for number in range(max_clips)]


def davis_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder in the DAVIS layout; a labeled tour has it as a subfolder."""
    return Path(folder, "davis") if Path(folder, "davis").is_dir() else Path(folder)


def batched_clips(clips: list[ClipFiles], *, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read clips in batches of equal frame size: (B, T, H, W, 3) and (B, T, H, W) uint8."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for clip in clips:
        read = clip.read()
        if waiting and (len(waiting) == batch_size or read[1].shape != waiting[0][1].shape):
            yield _stack(waiting)
            waiting = []
        waiting.append(read)
    if waiting:
        yield _stack(waiting)


def _stack(clips: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    frames, ids = zip(*clips, strict=True)
    return np.stack(frames), np.stack(ids)


def _sequence_names(root: Path, images: Path) -> list[str]:
    """Return the sequences of the validation list, or all if there is no list."""
    listed = root / "ImageSets" / "2017" / "val.txt"
    names = listed.read_text().split() if listed.is_file() else [entry.name for entry in images.iterdir()]
    return sorted(name for name in names if (images / name).is_dir())


def _cut(sequence: Path, num_frames: int, stride: int) -> Iterator[list[Path]]:
    frames = sorted(path for path in sequence.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    span = 1 + (num_frames - 1) * stride
    for start in range(0, len(frames) - span + 1, span):
        yield frames[start : start + span : stride]


def _mask_of(frame: Path, images: Path, annotations: Path) -> Path:
    path = annotations / frame.relative_to(images).with_suffix(".png")
    if not path.is_file():
        raise ConfigError(f"{frame} has no mask {path}: every frame of a labeled clip needs one")
    return path


def _read_ids(paths: Sequence[Path]) -> list[np.ndarray]:
    """Read the masks of a clip, (H, W) uint8 each: 0 for background and void pixels."""
    masks = read_masks(paths)
    found = sorted({int(value) for mask in masks for value in np.unique(mask)} - {0})
    objects = [value for value in found if value != VOID] or found
    if not objects or objects[-1] < VOID:
        return [np.where(mask == VOID, 0, mask).astype(np.uint8) for mask in masks]
    # Colors, or a single object with value 255, are renumbered from 1.
    numbered = [np.zeros(mask.shape, np.uint8) for mask in masks]
    for ids, mask in zip(numbered, masks, strict=True):
        for number, value in enumerate(objects, start=1):
            ids[mask == value] = number
    return numbered
