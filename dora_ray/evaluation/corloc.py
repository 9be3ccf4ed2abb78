"""Object discovery without labels: does one box, found in an image by the encoder alone, hit one of its objects?

Legend: h x w patches, N = h w, D width, H heads. A box is (left, top, right, bottom) in pixels, the right and the lower
edge excluded.

CorLoc is the share of images whose box has an intersection over union of at least 0.5 with a ground-truth box. Two
ways to a box: `attention`, the CLS attention of the last block, mean over heads; and `lost` (Simeoni et al., BMVC
2021), from the keys of the last block.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dora_ray.errors import ConfigError
from dora_ray.evaluation.features import Progress, normalize, report_unreadable
from dora_ray.evaluation.images import open_rgb, whole_size
from dora_ray.evaluation.intervals import share_interval
from dora_ray.folders import visible_files
from dora_ray.method.vit import tracked_features

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

Box = tuple[float, float, float, float]
Method = Literal["attention", "lost"]
# More patches of an image cannot be compared with each other: attention takes 2.4 GB with 6 heads.
MOST_PATCHES = 10_000
LAYOUT = (
    "Pascal VOC's (FOLDER/JPEGImages/*.jpg, FOLDER/Annotations/*.xml, and FOLDER/ImageSets/Main/trainval.txt if there "
    'is one), or FOLDER/images/* and FOLDER/boxes.json {"image.jpg": [[left, top, right, bottom], ...]}'
)


def find_boxes(folder: str | os.PathLike[str]) -> list[tuple[Path, list[Box]]]:
    """The images and their ground-truth boxes, by name; images without a box are left out.

    Raises:
        ConfigError: Another layout, an annotation that cannot be read, or no box at all.
    """
    root = Path(folder)
    if (root / "boxes.json").is_file():
        found = _listed_boxes(root)
    elif (root / "JPEGImages").is_dir() and (root / "Annotations").is_dir():
        found = [
            (root / "JPEGImages" / f"{name}.jpg", _voc_boxes(root / "Annotations" / f"{name}.xml"))
            for name in _voc_names(root)
        ]
    else:
        raise ConfigError(f"{root} has no known layout of images and boxes. Use {LAYOUT}.")
    for path, boxes in found:
        for left, top, right, bottom in boxes:
            if not (left < right and top < bottom):
                box = f"left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g}"
                raise ConfigError(f"{path} has a box without an area ({box}); correct its annotation.")
    found = [(path, boxes) for path, boxes in found if boxes]
    if not found:
        raise ConfigError(f"{root} names no image with a box. Use {LAYOUT}.")
    return found


def _listed_boxes(root: Path) -> list[tuple[Path, list[Box]]]:
    path = root / "boxes.json"
    try:
        listed = json.loads(path.read_text())
        return [
            (root / "images" / name, [(float(a), float(b), float(c), float(d)) for a, b, c, d in listed[name]])
            for name in sorted(listed)
        ]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Use {LAYOUT}.") from error


def _voc_names(root: Path) -> list[str]:
    chosen = root / "ImageSets" / "Main" / "trainval.txt"
    return (
        chosen.read_text().split()
        if chosen.is_file()
        else [path.stem for path in visible_files(root / "Annotations", {".xml"})]
    )


def _voc_boxes(path: Path) -> list[Box]:
    """Every object's box; VOC counts pixels from 1 and includes the last one."""
    try:
        boxes = [entry.find("bndbox") for entry in ElementTree.parse(path).getroot().iter("object")]
        sides = [
            [float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")]
            for box in boxes
            if box is not None
        ]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise ConfigError(
            f"{path} cannot be read as a Pascal VOC annotation ({error}). Repair or remove it."
        ) from error
    return [(left - 1, top - 1, right, bottom) for left, top, right, bottom in sides]


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


def is_hit(box: Box, truths: Sequence[Box]) -> bool:
    """Tell a box that overlaps with a true one by half of their union, or more."""
    return max(box_iou(box, truth) for truth in truths) >= 0.5


def attention_patches(attention: Tensor) -> tuple[Tensor, int]:
    """From CLS attention (H, N): patches (N,) bool above the mean, heads being averaged, and the largest patch."""
    mean = attention.mean(dim=0)
    return mean > mean.mean(), int(mean.argmax())


def lost_patches(key: Tensor, *, num_seeds: int) -> tuple[Tensor, int]:
    """From keys (N, D): the patches (N,) bool of one object, and its seed.

    The seed is the patch that correlates positively with the fewest others: objects are smaller than their background.
    It is joined by those of the `num_seeds` such patches that correlate positively with it; the object is every patch
    that correlates positively with their sum.
    """
    correlation = key @ key.T
    degree = (correlation > 0).sum(dim=-1)
    seed = int(degree.argmin())
    candidates = degree.argsort(stable=True)[:num_seeds]
    joined = candidates[correlation[seed, candidates] > 0]
    return correlation[joined].sum(dim=0) > 0, seed


def component(patches: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """The patches (h, w) bool that are connected with `start` by their sides, `start` included."""
    height, width = patches.shape
    found = np.zeros_like(patches)
    waiting = [start]
    while waiting:
        y, x = waiting.pop()
        if found[y, x]:
            continue
        found[y, x] = True
        neighbors = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
        waiting += [(a, b) for a, b in neighbors if 0 <= a < height and 0 <= b < width and patches[a, b]]
    return found


def patch_box(patches: np.ndarray, *, width: int, height: int) -> Box:
    """The box around patches (h, w) bool, in pixels of the image that they divide into equal parts."""
    rows, columns = np.flatnonzero(patches.any(axis=1)), np.flatnonzero(patches.any(axis=0))
    y, x = height / patches.shape[0], width / patches.shape[1]
    return (float(columns[0] * x), float(rows[0] * y), float((columns[-1] + 1) * x), float((rows[-1] + 1) * y))


def discover_box(
    vit: VisionTransformer,
    image: Image.Image,
    *,
    method: Method,
    short_side: int | None,
    long_side: int,
    num_seeds: int,
    device: str,
) -> Box:
    """The box of the object that the encoder finds in an image.

    Args:
        vit: On `device`, in evaluation mode.
        image: RGB.
        method: "attention" or "lost".
        short_side: Of what the encoder sees, pixels; None: the image's own, or less, so that its long side is at most
            `long_side`. Sides are rounded to whole patches.
        long_side: Pixels.
        num_seeds: As `lost_patches`.
        device: Of the encoder.

    Raises:
        ConfigError: The image has so many patches at this size that comparing them all takes gigabytes.
    """
    patch = int(vit.patch_embed.patch_size[0])
    shown = short_side or min(image.size) * min(1.0, long_side / max(image.size))
    width, height = whole_size(image.size, short_side=shown, patch_size=patch)
    if width * height > MOST_PATCHES * patch**2:
        raise ConfigError(
            f"{width}x{height} pixels are {width * height // patch**2:,} patches of {patch} px, and {MOST_PATCHES:,} "
            f"can be compared; lower {'short_side' if short_side else 'long_side'}."
        )
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).copy()
    frames = normalize(torch.from_numpy(pixels)[None].to(device))[None]
    tracked = tracked_features(vit, frames, block=-1)
    if method == "lost":
        chosen, seed = lost_patches(tracked.key[0, 0].float(), num_seeds=num_seeds)
    else:
        chosen, seed = attention_patches(tracked.cls_attention0[0].float())
    grid = chosen.cpu().numpy().reshape(height // patch, width // patch)
    row, column = divmod(seed, grid.shape[1])
    return patch_box(component(grid, (row, column)), width=image.width, height=image.height)


@torch.inference_mode()
def evaluate_corloc(
    backbone: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    method: Method,
    short_side: int | None,
    long_side: int,
    num_seeds: int,
    max_images: int | None,
    device: str,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Share of a folder's images in which the encoder finds an object.

    Args:
        backbone: On `device`, in evaluation mode.
        data: The folder of images and boxes.
        method: As `discover_box`.
        short_side: As `discover_box`.
        long_side: As `discover_box`.
        num_seeds: As `lost_patches`.
        max_images: The first ones of the list; None: all.
        device: Where the encoder runs.
        skip_unreadable: Leave out images that cannot be read, with a warning.
        progress: Told the number of images that are done, and of all.

    Returns:
        corloc in [0, 1] and its 95 % interval; whole_image, the same share for the box around the whole image, to
        compare with; num_images.

    Raises:
        ConfigError: As `find_boxes`, or images that cannot be read.
    """
    discover = functools.partial(
        discover_box,
        backbone,
        method=method,
        short_side=short_side,
        long_side=long_side,
        num_seeds=num_seeds,
        device=device,
    )
    found = find_boxes(data)[:max_images]
    hits: list[tuple[bool, bool]] = []
    failures: list[str] = []
    for number, (path, boxes) in enumerate(found, start=1):
        try:
            image = open_rgb(path)
            if skip_unreadable or not failures:
                whole = (0.0, 0.0, image.width, image.height)
                hits.append((is_hit(discover(image), boxes), is_hit(whole, boxes)))
        except ConfigError as error:
            failures.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        if progress is not None:
            progress(number, len(found))
    report_unreadable(failures, len(found), skip_unreadable=skip_unreadable)
    right, whole_right = (int(np.sum(column)) for column in zip(*hits, strict=True))
    return {
        "corloc": right / len(hits),
        "corloc_interval": share_interval(right, len(hits)),
        "whole_image": whole_right / len(hits),
        "num_images": len(hits),
        "num_unreadable": len(failures),
    }
