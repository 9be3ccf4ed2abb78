"""Labeled images in a folder, and a frozen encoder's features of them.

Legend: M images, D width, S size of a square image in pixels.

Protocol (DINO's, for kNN and linear probes): resize the short side to S x 256 / 224 (bicubic, antialiased), crop the
center S x S, normalize with ImageNet's mean and standard deviation; one view per image, no augmentation.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dora_ray import unreadable
from dora_ray.errors import ConfigError
from dora_ray.evaluation.images import SUFFIXES, open_rgb, read_image
from dora_ray.folders import is_hidden, visible_files
from dora_ray.imagenet import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["LabeledImages", "extract", "extract_splits", "find_splits", "normalize", "open_rgb", "training_size"]

logger = logging.getLogger(__name__)

# Common names (letters only) of folders with unlabeled images beside the classes.
UNLABELED = frozenset(
    ("unlabeled", "unlabelled", "unlabel", "nolabel", "nolabels", "withoutlabels", "unsup", "unsupervised")
)
LAYOUT = "FOLDER/train/CLASS/image.jpg and FOLDER/test/CLASS/image.jpg (val/ in place of test/ is fine)"


@dataclass(frozen=True)
class LabeledImages:
    """Image files and their labels, in a fixed order (by class, then by name).

    Attributes:
        paths: M files.
        labels: (M,) int64, indices into `classes`.
        classes: Class names, sorted.
        num_unreadable: Number of files left out because they cannot be read.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    num_unreadable: int = 0

    def thinned(self, max_images: int | None) -> LabeledImages:
        """Keep at most `max_images`, evenly spaced over the list, so that every class keeps its share; None: all."""
        if max_images is None or max_images >= len(self.paths):
            return self
        return self.only([index * len(self.paths) // max_images for index in range(max_images)])

    def only(self, kept: Sequence[int]) -> LabeledImages:
        """Return the images at the given indices."""
        return LabeledImages(tuple(self.paths[index] for index in kept), self.labels[list(kept)], self.classes)


def find_images(folder: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> LabeledImages:
    """Find the images of FOLDER/CLASS/, searched recursively.

    Args:
        folder: Folder with one subfolder per class.
        classes: Class names that define the labels; None: the folder's own.

    Raises:
        ConfigError: There is no folder, no class, a class without images, or a class that is not in `classes`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"No folder {root}. Labeled images are laid out as {LAYOUT}.")
    found = _class_folders(root)
    if not found:
        raise ConfigError(f"{root} has no class folders. Labeled images are laid out as {LAYOUT}.")
    names = tuple(found if classes is None else classes)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ConfigError(f"{root} has classes that the training split lacks: {', '.join(unknown[:8])}.")
    by_class = {name: visible_files(root / name, SUFFIXES) for name in found}
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise ConfigError(f"{root / empty[0]} has no images; supported suffixes: {', '.join(SUFFIXES)}.")
    labels = [names.index(name) for name, paths in by_class.items() for _ in paths]
    paths = tuple(path for paths in by_class.values() for path in paths)
    return LabeledImages(paths, torch.tensor(labels, dtype=torch.int64), names)


def _class_folders(root: Path) -> list[str]:
    """Return the names of the class folders, without symbolic links that lead back to a parent.

    Raises:
        ConfigError: A folder's name says that it holds unlabeled images.
    """
    above = {root.resolve(), *root.resolve().parents}
    found = [entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name)]
    names = sorted(entry.name for entry in found if entry.resolve() not in above)
    for name in names:
        if re.sub(r"[^a-z]", "", name.lower()) in UNLABELED:
            raise ConfigError(
                f"{root / name} looks like unlabeled images, which would be scored as another class. "
                f"Move it out of {root}, or rename it if it is a class."
            )
    return names


def find_splits(folder: str | os.PathLike[str]) -> tuple[LabeledImages, LabeledImages]:
    """Return the training and test splits of a labeled folder; the training split defines the labels.

    Raises:
        ConfigError: As `find_images`, or the layout is unknown.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"No folder {root}. Labeled images are laid out as {LAYOUT}.")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise ConfigError(f"{root} holds {found}. Labeled images are laid out as {LAYOUT}.")
    train = find_images(root / "train")
    if len(train.classes) < 2:
        raise ConfigError(
            f"{root / 'train'} has a single class, {train.classes[0]}, so every answer would be right. "
            f"Provide a folder for each class: {LAYOUT}."
        )
    asked = find_images(test, classes=train.classes)
    _warn_of_a_class_like_no_labels(root / "train", train, asked)
    return train, asked


def _warn_of_a_class_like_no_labels(folder: Path, train: LabeledImages, test: LabeledImages) -> None:
    """Warn of a class with most of the training images and no test image: its votes can only be wrong."""
    sizes = torch.bincount(train.labels, minlength=len(train.classes)).tolist()
    asked = set(test.labels.tolist())
    for number, name in enumerate(train.classes):
        if number not in asked and sizes[number] > len(train.labels) / 2:
            logger.warning(
                "%s has %d of %d training images and no test image: it looks like unlabeled images, which can only "
                "lower the score; move it out if it is not a class",
                folder / name, sizes[number], len(train.labels),
            )  # fmt: skip


def normalize(pixels: Tensor) -> Tensor:
    """Normalize (M, S, S, 3) uint8 to (M, 3, S, S) float32 with ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device)
    std = torch.tensor(IMAGENET_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images.

    Attributes:
        numbers: Indices in the list of files.
        pixels: (M, S, S, 3) uint8.
    """

    numbers: tuple[int, ...]
    pixels: Tensor


def image_batches(
    paths: Sequence[Path], *, size: int, batch_size: int, num_workers: int, skip_unreadable: bool = False
) -> Iterator[ImageBatch]:
    """Yield batches in the order of `paths`; the next batch is prefetched while the current one is used.

    Raises:
        ConfigError: Some files cannot be read; raised after the last batch, naming all of them. With `skip_unreadable`
            they are left out, and the error is raised only if no file is left.
    """
    failures: list[str] = []
    # Threads are enough, as Pillow decodes and resizes without the GIL; a Ray worker must not fork.
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        waiting: list[tuple[int, Future[np.ndarray]]] = []
        for start in range(0, len(paths) + batch_size, batch_size):
            numbers = range(start, min(start + batch_size, len(paths)))
            following = [(number, pool.submit(read_image, paths[number], size=size)) for number in numbers]
            yield from _readable(waiting, failures, skip_unreadable=skip_unreadable)
            waiting = following
    report_unreadable(failures, len(paths), skip_unreadable=skip_unreadable)


def _readable(
    waiting: Sequence[tuple[int, Future[np.ndarray]]], failures: list[str], *, skip_unreadable: bool
) -> Iterator[ImageBatch]:
    """Yield the readable images of a batch; nothing after a failure that will raise an error in the end."""
    read = {}
    for number, future in waiting:
        try:
            read[number] = future.result()
        except ConfigError as error:
            failures.append(str(error))
    if read and (skip_unreadable or not failures):
        yield ImageBatch(tuple(read), torch.from_numpy(np.stack(list(read.values()))))


def report_unreadable(failures: Sequence[str], num_files: int, *, skip_unreadable: bool) -> None:
    """Report files that could not be read: as a warning if they are skipped, else as an error.

    Raises:
        ConfigError: Some files are unreadable and not skipped, or all files are unreadable.
    """
    unreadable.report_unreadable(failures, num_files, skip=skip_unreadable, option="skip_unreadable", kind=ConfigError)


def training_size(vit: VisionTransformer) -> int:
    """Return the size of the square images that the encoder was trained on, in pixels."""
    return int(vit.patch_embed.img_size[0])


@torch.inference_mode()
def extract(
    encode: Callable[[Tensor], Tensor],
    images: LabeledImages,
    *,
    size: int,
    batch_size: int,
    num_workers: int,
    device: str,
    skip_unreadable: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, LabeledImages]:
    """Return the features of image files, in order, and the images that were read.

    Args:
        encode: Maps (M, 3, S, S) normalized float32 on `device` to (M, D).
        images: M image files.
        size: S.
        batch_size: Images per forward pass.
        num_workers: Threads that read images.
        device: Device of `encode`.
        skip_unreadable: Leave out files that cannot be read, with a warning.
        progress: Called with the number of images after each batch.

    Returns:
        (M, D) float32 on the CPU, and the images without skipped ones.

    Raises:
        ConfigError: As `image_batches`.
    """
    features: list[Tensor] = []
    kept: list[int] = []
    options: dict[str, Any] = {
        "size": size,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "skip_unreadable": skip_unreadable,
    }
    for batch in image_batches(images.paths, **options):
        features.append(encode(normalize(batch.pixels.to(device))).float().cpu())
        kept += batch.numbers
        if progress is not None:
            progress(len(batch.numbers))
    left = replace(images.only(kept), num_unreadable=len(images.paths) - len(kept))
    return torch.cat(features), left


Progress = Callable[[int, int], None]  # called with (done, total)


def extract_splits(
    encode: Callable[[Tensor], Tensor],
    data: str | os.PathLike[str],
    *,
    max_images: int | None,
    progress: Progress | None,
    **options: Any,
) -> tuple[tuple[Tensor, LabeledImages], tuple[Tensor, LabeledImages]]:
    """Return the features and images of the training and test splits of a labeled folder.

    Args:
        encode: As `extract`.
        data: FOLDER/train/CLASS/* and FOLDER/test/CLASS/*.
        max_images: Images per split, evenly spaced over its list; None: all.
        progress: Called with the number of images after each batch.
        **options: The other arguments of `extract`.

    Raises:
        ConfigError: As `find_splits` and `extract`.
    """
    train, test = (part.thinned(max_images) for part in find_splits(data))
    # Extract both together, so that one error names all unreadable files.
    both = LabeledImages((*train.paths, *test.paths), torch.cat([train.labels, test.labels]), train.classes)
    done, total = 0, len(both.paths)

    def count(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    features, kept = extract(encode, both, progress=count, **options)
    of_train = set(train.paths)
    places = [number for number, path in enumerate(kept.paths) if path in of_train]
    others = [number for number, path in enumerate(kept.paths) if path not in of_train]
    if not places or not others:
        raise ConfigError(f"{data}: none of the {'test' if places else 'training'} images can be read.")
    parts = [
        (features[chosen], replace(kept.only(chosen), num_unreadable=len(part.paths) - len(chosen)))
        for part, chosen in ((train, places), (test, others))
    ]
    return parts[0], parts[1]


def counts(train: LabeledImages, test: LabeledImages) -> dict[str, int]:
    """Return the numbers of images and classes behind a score."""
    return {
        "num_train": len(train.paths),
        "num_test": len(test.paths),
        "num_classes": len(train.classes),
        "num_unreadable": train.num_unreadable + test.num_unreadable,
    }


def final_cls(vit: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """Return a function from (M, 3, S, S) to the CLS tokens (M, D) after the final norm."""
    return lambda images: vit.forward_features(images)[:, 0]


def last_cls(vit: VisionTransformer, *, num_blocks: int) -> Callable[[Tensor], Tensor]:
    """Return a function from (M, 3, S, S) to the last blocks' normed CLS tokens, concatenated: (M, blocks x D)."""

    def encode(images: Tensor) -> Tensor:
        outputs = vit.get_intermediate_layers(images, n=num_blocks, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in outputs], dim=-1)

    return encode
