"""Read one image file the way a viewer shows it, in 8-bit RGB, or refuse it in a sentence with its name.

Legend: S side of a square image, H x W pixels.

Beyond `Image.convert`: gray levels of 16 bits and floating point are scaled (Pillow would cut them off at 255, which
makes nearly every picture white), the camera's orientation is applied, and transparent parts show white.
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
# Pillow refuses more than this as a possible attack, and warns from half of it on; photographs reach the half.
LARGEST_PIXELS = 2 * 89_478_485
# Fewer gray levels than this are left of a 16-bit picture that uses a small part of its range, as 12-bit cameras do.
FEWEST_LEVELS = 16
# The center crop of a strip looks no farther along it than this many times its short side.
LONGEST_STRIP = 4
_INTEGERS_ARE_16_BIT = ("PNG", "PPM")
_open_lock = threading.Lock()


def open_rgb(path: Path) -> Image.Image:
    """Return an image file, decoded, upright, in RGB.

    Raises:
        ConfigError: The file cannot be read as an image, or its values have no known white.
    """
    try:
        with _open_header(path) as image:
            return _to_rgb(image)
    except Exception as error:  # on damaged files Pillow's readers raise errors of any kind
        raise ConfigError(unreadable(path, error)) from error


def unreadable(path: Path, error: Exception) -> str:
    """Return the sentence about a file that is no image; for errors of any reader."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{path} cannot be read as an image ({reason[:200]}). Repair or remove it."


def _open_header(path: Path) -> Image.Image:
    """Open a file without decoding it, under our own limit of pixels, which gives no warning below it.

    Pillow's limit is one for all threads: another one, amid a crop, may read it in between, so it stays a number.
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
        raise ValueError(f"{size} pixels are more than the {LARGEST_PIXELS:,} that are read; make it smaller")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(gray_levels(np.asarray(image), wide=_is_16_bit(image))).convert("RGB")
    if image.mode in ("RGBa", "La"):  # colors multiplied by their opacity
        image = image.convert("RGBA")
    if "A" in image.getbands() or "transparency" in image.info:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Tell 16-bit integers, which Pillow opens as I;16 or, from some formats, as 32-bit ones."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in _INTEGERS_ARE_16_BIT)


def gray_levels(values: np.ndarray, *, wide: bool) -> np.ndarray:
    """Scale gray values to 8 bits by their type's own range: never by a picture's own, which would change its light.

    Args:
        values: (H, W) integers or floating point.
        wide: Integers are of 16 bits, white being 65535.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: White is not known, or hardly any levels would be left.
    """
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # not a number, too
            raise ValueError(f"floating-point values from {low:g} to {high:g}, where black is 0 and white 1; {_SAVE}")
        return np.round(values * 255).astype(np.uint8)
    if not wide:
        raise ValueError(f"32-bit integers from {low:g} to {high:g}, which have no agreed white; {_SAVE}")
    if 0 < high < FEWEST_LEVELS * 257 and high > low:
        raise ValueError(f"16-bit values end at {high:g} of 65535, which shows as black; {_SAVE}")
    return np.round(values / 257).astype(np.uint8)


_SAVE = "save it with 8 bits"


def read_image(path: Path, *, size: int) -> np.ndarray:
    """Return one image, resized and cut as the protocol says: (S, S, 3) uint8.

    Raises:
        ConfigError: As `open_rgb`.
    """
    return np.asarray(center_crop(open_rgb(path), size=size))


def center_crop(image: Image.Image, *, size: int) -> Image.Image:
    """Return the center S x S of the image whose short side was resized to S x 256 / 224."""
    image = _shortened(image)
    short = round(size * 256 / 224)
    scale = short / min(image.size)
    width, height = (max(short, round(side * scale)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _shortened(image: Image.Image) -> Image.Image:
    """Cut the ends off a strip: resized whole, one of 10 x 20000 pixels would take gigabytes."""
    longest = LONGEST_STRIP * min(image.size)
    if max(image.size) <= longest:
        return image
    width, height = (min(side, longest) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def whole_size(size: tuple[int, int], *, short_side: float, patch_size: int) -> tuple[int, int]:
    """The (width, height) in whole patches nearest to `size` scaled to that short side, for images seen whole."""
    scale = short_side / min(size)
    width, height = (max(1, round(side * scale / patch_size)) * patch_size for side in size)
    return width, height
