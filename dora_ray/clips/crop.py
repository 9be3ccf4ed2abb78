"""First crop of a clip: draw the box, then cut and resize.

torch is imported only where pixels are resized, so planning a run and `--help` do not load it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Range = tuple[float, float]
Interpolation = Literal["bilinear", "bicubic"]

_NUM_ATTEMPTS = 10


def random_boxes(
    rng: np.random.Generator, *, count: int, height: int, width: int, scale: Range, ratio: Range
) -> np.ndarray:
    """Draw random-resized-crop boxes.

    The area is uniform in ``scale`` times the image's area, the aspect (width / height) log-uniform in ``ratio``.
    The first of ten attempts that fits is kept; otherwise the largest centered box with an allowed aspect. The
    amount of randomness taken from ``rng`` depends on ``count`` alone.

    Args:
        rng: the only source of randomness.
        count: number of boxes, may be 0.
        height: image height in pixels.
        width: image width in pixels.
        scale: lowest and highest share of the image's area.
        ratio: lowest and highest width / height.

    Returns:
        (count, 4) float64 whole numbers: top, left, height, width. Every box lies inside the image.
    """
    areas = height * width * rng.uniform(scale[0], scale[1], (_NUM_ATTEMPTS, count))
    aspects = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (_NUM_ATTEMPTS, count)))
    place = rng.random((2, count))
    heights, widths = np.round(np.sqrt(areas / aspects)), np.round(np.sqrt(areas * aspects))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.argmax(axis=0)[None]
    fallback_height, fallback_width = _largest_box(height=height, width=width, ratio=ratio)
    found = fits.any(axis=0)
    box_height = np.where(found, np.take_along_axis(heights, first, 0)[0], fallback_height)
    box_width = np.where(found, np.take_along_axis(widths, first, 0)[0], fallback_width)
    top = np.where(found, np.floor(place[0] * (height - box_height + 1)), (height - fallback_height) // 2)
    left = np.where(found, np.floor(place[1] * (width - box_width + 1)), (width - fallback_width) // 2)
    return np.stack([top, left, box_height, box_width], axis=1)


def crop_clip(frames: Sequence[np.ndarray], box: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    """Cut one box out of every frame of a clip and resize it on the CPU (bilinear, antialiased).

    Args:
        frames: T arrays (H, W, 3) uint8 of one size.
        box: top, left, height, width in pixels, inside the frames.
        size: S, in pixels.

    Returns:
        (T, S, S, 3) uint8, contiguous.

    Raises:
        ValueError: the frames differ in size, or the box leaves them.
    """
    top, left, height, width = (int(number) for number in box)
    shapes = {frame.shape for frame in frames}
    if len(shapes) != 1:
        raise ValueError(f"all frames of a clip must have the same size, got {sorted(shapes)}")
    full_height, full_width, _ = shapes.pop()
    if min(top, left) < 0 or min(height, width) < 1 or top + height > full_height or left + width > full_width:
        raise ValueError(f"the box {(top, left, height, width)} is not inside a frame of {full_height} x {full_width}")
    import torch

    crops = np.stack([frame[top : top + height, left : left + width] for frame in frames])
    return resize_uint8(torch.from_numpy(crops), size).permute(0, 2, 3, 1).contiguous().numpy()


def resize_uint8(frames: Tensor, size: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Resize (T, h, w, 3) uint8 to (T, 3, S, S) uint8; the kernel is fastest on channels-last input."""
    from torch.nn.functional import interpolate

    channels_first = frames.permute(0, 3, 1, 2)
    return interpolate(channels_first, (size, size), mode=interpolation, antialias=True)


def _largest_box(*, height: int, width: int, ratio: Range) -> tuple[int, int]:
    """Return height and width of the largest box in the image with an aspect in ``ratio``."""
    if width / height < ratio[0]:
        return min(height, max(1, round(width / ratio[0]))), width
    if width / height > ratio[1]:
        return height, min(width, max(1, round(height * ratio[1])))
    return height, width
