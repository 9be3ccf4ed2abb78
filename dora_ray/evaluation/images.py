"""Read an image file in 8-bit RGB as a viewer shows it, or raise an error that names the file.

Legend: S side of a square image, H x W pixels.

In addition to `Image.convert`: 16-bit and floating-point gray levels are scaled (Pillow would clip them at 255, making
nearly every picture white), EXIF orientation is applied, and transparent parts become white.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dora_ray.errors import ConfigError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".gif", ".pgm", ".ppm", ".pbm", ".jp2", ".avif"),
)
# Pillow's limit against decompression bombs. Pillow warns from half of it on, which large photographs reach.
LARGEST_PIXELS = 2 * 89_478_485
# Fewest 8-bit gray levels that must be left of a 16-bit picture; 12-bit cameras use only part of the range.
FEWEST_LEVELS = 16
# Before the center crop, the long side of an image is cut to this many times its short side.
LONGEST_STRIP = 4
_INTEGERS_ARE_16_BIT = ("PNG", "PPM")
_open_lock = threading.Lock()


def open_rgb(path: Path) -> Image.Image:
    """Read an image file as upright RGB.

    Raises:
        ConfigError: The file cannot be read as an image, or the range of its values is unknown.
    """
    try:
        with _open_header(path) as image:
            return _to_rgb(image)
    except Exception as error:  # on damaged files Pillow's readers raise errors of any kind
        raise ConfigError(unreadable(path, error)) from error


def unreadable(path: Path, error: Exception) -> str:
    """Return the message for a file that cannot be read as an image."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{path} cannot be read as an image ({reason[:200]}). Repair or remove it."


def _open_header(path: Path) -> Image.Image:
    """Open a file without decoding it, with our own pixel limit, which gives no warnings below it.

    Pillow's limit is global, and another thread may read it meanwhile in a crop, so it must stay a number (not None).
    """
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, sys.maxsize
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > LARGEST_PIXELS:
        size = f"{image.width}x{image.height}"
        image.close()
        raise ValueError(f"{size} pixels exceed the limit of {LARGEST_PIXELS:,}; make it smaller")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(gray_levels(np.asarray(image), wide=_is_16_bit(image))).convert("RGB")
    if image.mode in ("RGBa", "La"):  # premultiplied alpha
        image = image.convert("RGBA")
    if "A" in image.getbands() or "transparency" in image.info:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Return whether an image has 16-bit integers, which Pillow opens as I;16 or, for some formats, as 32-bit."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in _INTEGERS_ARE_16_BIT)


def gray_levels(values: np.ndarray, *, wide: bool) -> np.ndarray:
    """Scale gray values to 8 bits by the range of their type, not of the picture, which would change its brightness.

    Args:
        values: (H, W) integers or floating point.
        wide: Integers have 16 bits; white is 65535.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: The range is unknown, or hardly any levels would be left.
    """
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise ValueError(f"floating-point values from {low:g} to {high:g}, not 0 (black) to 1 (white); {_SAVE}")
        return np.round(values * 255).astype(np.uint8)
    if not wide:
        raise ValueError(f"32-bit integers from {low:g} to {high:g}, whose white level is unknown; {_SAVE}")
    if 0 < high < FEWEST_LEVELS * 257 and high > low:
        raise ValueError(f"16-bit values reach only {high:g} of 65535, which is almost black; {_SAVE}")
    return np.round(values / 257).astype(np.uint8)


_SAVE = "save it with 8 bits"


def read_image(path: Path, *, size: int) -> np.ndarray:
    """Read an image, resized and cropped by the protocol, as (S, S, 3) uint8.

    Raises:
        ConfigError: As `open_rgb`.
    """
    return np.asarray(center_crop(open_rgb(path), size=size))


def center_crop(image: Image.Image, *, size: int) -> Image.Image:
    """Resize the short side to S x 256 / 224 and return the center S x S."""
    image = _shortened(image)
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _shortened(image: Image.Image) -> Image.Image:
    """Cut the ends off a very long image: resizing 10 x 20000 pixels as a whole would take gigabytes."""
    longest = LONGEST_STRIP * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def whole_size(size: tuple[int, int], *, short_side: float, patch_size: int) -> tuple[int, int]:
    """Return the (width, height) in whole patches nearest to `size` scaled to `short_side`."""
    scale = short_side / min(size)
    width, height = (max(1, round(side * scale / patch_size)) * patch_size for side in size)
    return width, height
