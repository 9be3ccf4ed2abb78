"""Labeled images of a folder, and a frozen encoder's features of them.

Legend: M images, D width, S size of a square image in pixels.

Protocol (DINO's, for kNN and linear probes): the image's short side is resized to S x 256 / 224 (bicubic,
antialiased), its center S x S is cut out and normalized with ImageNet's mean and standard deviation; one view an
image, no augmentation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.timm_folder import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LAYOUT = "FOLDER/train/CLASS/image.jpg and FOLDER/test/CLASS/image.jpg (val/ in place of test/ is fine)"


@dataclass(frozen=True)
class LabeledImages:
    """Image files and their labels, in a fixed order (by class, then by name).

    Attributes:
        paths: M files.
        labels: (M,) int64, indices into `classes`.
        classes: Names of the classes, sorted.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def thinned(self, max_images: int | None) -> LabeledImages:
        """At most `max_images` of them, evenly spaced over the list, so that every class keeps its share; None: all."""
        if max_images is None or max_images >= len(self.paths):
            return self
        kept = [index * len(self.paths) // max_images for index in range(max_images)]
        return LabeledImages(tuple(self.paths[index] for index in kept), self.labels[kept], self.classes)


def find_images(folder: str | os.PathLike[str], *, classes: Sequence[str] | None = None) -> LabeledImages:
    """The images of FOLDER/CLASS/, searched below each class too.

    Args:
        folder: The folder of the classes' folders.
        classes: Names that define the labels; None: the folder's own.

    Raises:
        ConfigError: No folder, no class, a class without images, or a class that is not in `classes`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"No folder {root}. Labeled images are laid out as {LAYOUT}.")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ConfigError(f"{root} has no folder of a class in it. Labeled images are laid out as {LAYOUT}.")
    names = tuple(found if classes is None else classes)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise ConfigError(f"{root} has classes that the training part lacks: {', '.join(unknown[:8])}.")
    by_class = {name: _image_files(root / name) for name in found}
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise ConfigError(f"{root / empty[0]} has no image in it; images end in {', '.join(SUFFIXES)}.")
    labels = [names.index(name) for name, paths in by_class.items() for _ in paths]
    paths = tuple(path for paths in by_class.values() for path in paths)
    return LabeledImages(paths, torch.tensor(labels, dtype=torch.int64), names)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def find_splits(folder: str | os.PathLike[str]) -> tuple[LabeledImages, LabeledImages]:
    """The training and the test part of a labeled folder; labels are the training part's.

    Raises:
        ConfigError: The layout is another one, or as `find_images`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"No folder {root}. Labeled images are laid out as {LAYOUT}.")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise ConfigError(f"{root} holds {found}. Labeled images are laid out as {LAYOUT}.")
    train = find_images(root / "train")
    return train, find_images(test, classes=train.classes)


def read_image(path: Path, *, size: int) -> np.ndarray:
    """One image, resized and cut as the protocol says: (S, S, 3) uint8.

    Raises:
        ConfigError: The file is no image that can be read.
    """
    return np.asarray(center_crop(open_rgb(path), size=size))


def open_rgb(path: Path) -> Image.Image:
    """An image file, decoded, in RGB.

    Raises:
        ConfigError: The file is no image that can be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ConfigError(f"{path} cannot be read as an image ({error}). Repair or remove it.") from error


def whole_size(size: tuple[int, int], *, short_side: int, patch_size: int) -> tuple[int, int]:
    """The (width, height) in whole patches nearest to `size` scaled to that short side, for images seen whole."""
    scale = short_side / min(size)
    width, height = (max(1, round(side * scale / patch_size)) * patch_size for side in size)
    return width, height


def center_crop(image: Image.Image, *, size: int) -> Image.Image:
    """The center S x S of the image whose short side was resized to S x 256 / 224."""
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def normalize(pixels: Tensor) -> Tensor:
    """(M, S, S, 3) uint8 to (M, 3, S, S) float32 with ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device)
    std = torch.tensor(IMAGENET_STD, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def image_batches(paths: Sequence[Path], *, size: int, batch_size: int, num_workers: int) -> Iterator[Tensor]:
    """Batches of (M, S, S, 3) uint8 in the order of `paths`; the next batch is read while the last one is used."""
    # Threads are enough: Pillow decodes and resizes outside the interpreter's lock, and a Ray worker must not fork.
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        waiting: list[Future[np.ndarray]] | None = None
        for start in range(0, len(paths), batch_size):
            following = [pool.submit(read_image, path, size=size) for path in paths[start : start + batch_size]]
            if waiting is not None:
                yield _stack(waiting)
            waiting = following
        if waiting is not None:
            yield _stack(waiting)


def _stack(images: Sequence[Future[np.ndarray]]) -> Tensor:
    return torch.from_numpy(np.stack([image.result() for image in images]))


def training_size(vit: VisionTransformer) -> int:
    """The size of square images that the encoder was trained on, in pixels."""
    return int(vit.patch_embed.img_size[0])


@torch.inference_mode()
def extract(
    encode: Callable[[Tensor], Tensor],
    paths: Sequence[Path],
    *,
    size: int,
    batch_size: int,
    num_workers: int,
    device: str,
) -> Tensor:
    """The features of image files, in their order.

    Args:
        encode: (M, 3, S, S) normalized float32 on `device` to (M, D).
        paths: M image files.
        size: S.
        batch_size: Images a forward pass.
        num_workers: Threads that read images.
        device: Where `encode` lives.

    Returns:
        (M, D) float32 on the CPU.
    """
    batches = image_batches(paths, size=size, batch_size=batch_size, num_workers=num_workers)
    return torch.cat([encode(normalize(batch.to(device))).float().cpu() for batch in batches])


def final_cls(vit: VisionTransformer) -> Callable[[Tensor], Tensor]:
    """(M, 3, S, S) to (M, D): the CLS token after the final norm."""
    return lambda images: vit.forward_features(images)[:, 0]


def last_cls(vit: VisionTransformer, *, num_blocks: int) -> Callable[[Tensor], Tensor]:
    """(M, 3, S, S) to (M, num_blocks x D): CLS of the last blocks, each after the final norm, side by side."""

    def encode(images: Tensor) -> Tensor:
        outputs = vit.get_intermediate_layers(images, n=num_blocks, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in outputs], dim=-1)

    return encode
