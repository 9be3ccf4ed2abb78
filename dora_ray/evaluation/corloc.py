"""Object discovery without labels: the encoder proposes one box per image, which should hit an object (CorLoc).

Legend: h x w patches, N = h w, D width, H heads. A box is (left, top, right, bottom) in pixels, right and bottom
exclusive.

CorLoc is the share of images whose box has an intersection over union of at least 0.5 with a ground-truth box. There
are two methods: `attention`, the CLS attention of the last block averaged over heads; and `lost` (Simeoni et al., BMVC
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
# Limit on the patches of an image, all pairs of which are compared: attention takes 2.4 GB with 6 heads.
MOST_PATCHES = 10_000
LAYOUT = (
    "Pascal VOC's (FOLDER/JPEGImages/*.jpg, FOLDER/Annotations/*.xml, and FOLDER/ImageSets/Main/trainval.txt if there "
    'is one), or FOLDER/images/* and FOLDER/boxes.json {"image.jpg": [[left, top, right, bottom], ...]}'
)


def find_boxes(folder: str | os.PathLike[str]) -> list[tuple[Path, list[Box]]]:
    """Return the images and their ground-truth boxes, by name; images without a box are left out.

    Raises:
        ConfigError: The layout is unknown, an annotation cannot be read, or there is no box.
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
                raise ConfigError(f"{path} has an empty box ({box}); correct its annotation.")
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
    """Return the boxes of all objects; VOC counts pixels from 1 and includes the last one."""
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
    """Return the intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


def is_hit(box: Box, truths: Sequence[Box]) -> bool:
    """Return whether a box has an intersection over union of at least 0.5 with a ground-truth box."""
    return max(box_iou(box, truth) for truth in truths) >= 0.5


def attention_patches(attention: Tensor) -> tuple[Tensor, int]:
    """Return the patches (N,) bool whose CLS attention (H, N), averaged over heads, exceeds its mean, and the peak."""
    mean = attention.mean(dim=0)
    return mean > mean.mean(), int(mean.argmax())


def lost_patches(key: Tensor, *, num_seeds: int) -> tuple[Tensor, int]:
    """Return the patches (N,) bool of one object, and its seed, from keys (N, D) (LOST).

    The seed is the patch with the lowest degree, which correlates positively with the fewest others: objects are
    smaller than their background. Those of the `num_seeds` patches of lowest degree that correlate positively with the
    seed join it. The object is every patch that correlates positively with their sum.
    """
    correlation = key @ key.T
    degree = (correlation > 0).sum(dim=-1)
    seed = int(degree.argmin())
    candidates = degree.argsort(stable=True)[:num_seeds]
    joined = candidates[correlation[seed, candidates] > 0]
    return correlation[joined].sum(dim=0) > 0, seed


def component(patches: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """Return the 4-connected component of patches (h, w) bool that contains `start`; `start` is always included."""
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
    """Return the bounding box of patches (h, w) bool in pixels of an image of this size."""
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
    """Return the box of the object that the encoder discovers in an image.

    Args:
        vit: On `device`, in evaluation mode.
        image: RGB.
        method: "attention" or "lost".
        short_side: Short side of the encoder's input, pixels; None: the image's own, reduced so that the long side is
            at most `long_side`. Sides are rounded to whole patches.
        long_side: Limit of the long side, pixels.
        num_seeds: As `lost_patches`.
        device: Device of the encoder.

    Raises:
        ConfigError: The image has more than MOST_PATCHES patches at this size.
    """
    patch = int(vit.patch_embed.patch_size[0])
    shown = short_side or min(image.size) * min(1.0, long_side / max(image.size))
    width, height = whole_size(image.size, short_side=shown, patch_size=patch)
    if width * height > MOST_PATCHES * patch**2:
        raise ConfigError(
            f"{width}x{height} pixels are {width * height // patch**2:,} patches of {patch} px; at most "
            f"{MOST_PATCHES:,} are allowed: lower {'short_side' if short_side else 'long_side'}."
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
    """Evaluate CorLoc on a folder of images and boxes.

    Args:
        backbone: On `device`, in evaluation mode.
        data: The folder of images and boxes.
        method: As `discover_box`.
        short_side: As `discover_box`.
        long_side: As `discover_box`.
        num_seeds: As `lost_patches`.
        max_images: Use only the first images of the list; None: all.
        device: Where the encoder runs.
        skip_unreadable: Leave out images that cannot be read, with a warning.
        progress: Called with the number of images done and the total.

    Returns:
        corloc in [0, 1] and its 95 % interval; whole_image, the CorLoc of a box around the whole image, as a baseline;
        num_images; num_unreadable.

    Raises:
        ConfigError: As `find_boxes`, or an image cannot be read.
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
