"""Source material of labeled tours: photographs as scenery, and objects cut out of photographs.

Both come from scikit-image and scikit-learn, or from a user's folder. H, W height and width in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from dora_ray.errors import ConfigError
from dora_ray.video.synthetic import package_file

Polygon = Sequence[tuple[float, float]]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Longest side kept of a photograph: 40 megapixels would fill the memory with detail that no film shows.
MOST_PIXELS = 1600
ALPHA_THRESHOLD = 127
_ASTRONAUT = ("skimage", "data/astronaut.png")
_CHINA = ("sklearn", "datasets/images/china.jpg")
_COFFEE = ("skimage", "data/coffee.png")
_FLOWER = ("sklearn", "datasets/images/flower.jpg")
_MOTORCYCLE = ("skimage", "data/motorcycle_left.png")

# Outlines drawn by hand, in tenths of the photograph's width and height.
# fmt: off
OBJECTS: Mapping[str, tuple[tuple[str, str], Polygon]] = {
    "cat": (("skimage", "data/chelsea.png"), (
        (0.9, 0), (1.2, 1), (0.5, 3.5), (0, 6), (0.6, 8), (2.5, 9.7), (4.5, 9.6), (6.5, 9.6), (7.2, 8), (7.9, 6),
        (8.2, 4.5), (7.9, 2.8), (8.4, 1.6), (8.8, 0))),
    "cup": (_COFFEE, (
        (3, 1.5), (3.5, 0.8), (4.5, 0.4), (5.6, 0.5), (6.5, 1.2), (6.8, 1.8), (7.1, 1.7), (7, 3), (7.7, 4.3), (8, 5.8),
        (7.7, 7.3), (6.9, 8.6), (5.8, 9.3), (4.7, 9.5), (3.3, 9.1), (2.2, 8.2), (1.5, 7), (1.3, 5.6), (1.6, 4.3),
        (2.4, 3.1), (3, 2.6))),
    "flower": (_FLOWER, (
        (5, 2), (5.9, 2.3), (6.6, 3.2), (6.95, 4.5), (6.95, 6), (6.5, 7.3), (5.6, 8.2), (4.6, 8.4), (3.7, 8), (3, 6.8),
        (2.65, 5.3), (2.9, 3.9), (3.4, 2.8), (4.2, 2.2))),
    "helmet": (_ASTRONAUT, (
        (5.5, 10), (5.6, 8.6), (6.2, 7.6), (7, 6.9), (8, 6.7), (9, 7.2), (9.7, 8.2), (9.8, 10))),
    "motorcycle": (_MOTORCYCLE, (
        (1.4, 4.6), (2.1, 3.9), (2, 3.3), (2.6, 3.2), (3.5, 3.7), (4.8, 3.9), (5.5, 3.2), (6.1, 2.9), (6, 2.3),
        (6.9, 1.6), (7.3, 2.3), (7.6, 3), (7.5, 3.7), (7.1, 4), (7.3, 5.2), (8.3, 5.5), (8.9, 6.5), (9.2, 7.5),
        (9.1, 8.5), (8.6, 9), (7.9, 8.7), (7.2, 7.9), (6.7, 6.7), (6.1, 7.5), (4.9, 7.6), (4.7, 8.7), (4.3, 8.6),
        (4.4, 7.3), (3.4, 7.4), (2.9, 7.9), (2.2, 7.8), (1.7, 7), (1.6, 6), (1.9, 5.2), (1.4, 5))),
    "pagoda": (_CHINA, (
        (3, 0.7), (3.4, 0.7), (3.5, 1.4), (4.2, 2.2), (5, 2.6), (4.7, 3.7), (5.1, 4), (5, 5.2), (5.5, 5.8), (5.4, 6.3),
        (5.2, 7.4), (5.8, 7.8), (5.2, 8.6), (5, 9.4), (3.5, 9), (2.9, 7.9), (1.2, 7.8), (1.1, 7.2), (1.3, 6.6),
        (1.1, 6), (1.6, 5.3), (1.6, 4.4), (1.3, 4.1), (1.6, 3.6), (1.6, 2.9), (1.4, 2.6), (2.3, 2), (3.1, 1.2))),
    "person": (_ASTRONAUT, (
        (3, 1.2), (3.1, 0.6), (3.6, 0.3), (4.6, 0.3), (5.4, 0.5), (5.9, 1.2), (5.7, 2.2), (5.2, 2.5), (5.2, 3.3),
        (5.9, 4.2), (5.9, 5.1), (6.7, 5.4), (7, 6), (7, 6.9), (6.3, 7.4), (5.6, 8.3), (5.4, 10), (0.9, 10), (0.4, 8.6),
        (0.4, 7.3), (0.7, 6.1), (1.1, 5.4), (2.3, 4.7), (2.2, 3.9), (2.5, 3.3), (3.5, 2.9), (3.6, 2.5), (3.1, 2))),
    "shuttle": (_ASTRONAUT, (
        (7.8, 0), (8.4, 0), (8.5, 0.5), (8.8, 0.9), (8.85, 4.5), (9, 5.4), (7.1, 5.4), (7.1, 4.6), (7.5, 3.8),
        (7.4, 1.1), (7.7, 0.7))),
}
# Parts of photographs (left, top, right, bottom, in tenths) without any of the objects, so that every visible object is
# labeled.
SCENES: Sequence[tuple[tuple[str, str], tuple[float, float, float, float]]] = (
    (_CHINA, (6, 0, 10, 10)),
    (_FLOWER, (0, 0, 2.6, 10)),
    (_FLOWER, (7, 0, 10, 9)),
    (_COFFEE, (8.1, 0, 10, 10)),
    (_MOTORCYCLE, (4.6, 0, 10, 1.5)),
    (("skimage", "data/rocket.jpg"), (0, 0, 10, 10)),
    (("skimage", "data/hubble_deep_field.jpg"), (0, 0, 10, 10)),
    (("skimage", "data/ihc.png"), (0, 0, 10, 10)),
    (("skimage", "data/retina.jpg"), (2, 2, 8, 8)),
    (("skimage", "data/brick.png"), (0, 0, 10, 10)),
    (("skimage", "data/grass.png"), (0, 0, 10, 10)),
    (("skimage", "data/gravel.png"), (0, 0, 10, 10)),
)
# fmt: on


@dataclass(frozen=True, eq=False)
class Cutout:
    """Object to paste into pictures.

    Attributes:
        name: name of its class.
        picture: RGB, including its surroundings.
        mask: same size, 255 inside the object, else 0.
    """

    name: str
    picture: Image.Image
    mask: Image.Image


@dataclass(frozen=True, eq=False)
class Photographs:
    """Source material of one tour.

    Attributes:
        scenes: RGB pictures used as scenery.
        cutouts: the objects, at least one; several may share a class.
    """

    scenes: tuple[Image.Image, ...]
    cutouts: tuple[Cutout, ...]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted({cutout.name for cutout in self.cutouts})


@functools.lru_cache(maxsize=1)
def packaged_photographs() -> Photographs:
    """Return 12 scenes and 8 objects from photographs shipped with scikit-image and scikit-learn.

    Raises:
        ConfigError: one of the two is not installed.
    """
    scenes = []
    for place, box in SCENES:
        picture = _open(package_file(*place)).convert("RGB")
        left, top, right, bottom = (round(side) for side in _pixels(box, picture.size))
        scenes.append(picture.crop((left, top, right, bottom)))
    cutouts = []
    for name, (place, outline) in OBJECTS.items():
        picture = _open(package_file(*place)).convert("RGB")
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).polygon(_pixels([side for point in outline for side in point], picture.size), fill=255)
        cutouts.append(_trimmed(name, picture, mask))
    return Photographs(tuple(scenes), tuple(cutouts))


def photographs_of(folder: str | Path) -> Photographs:
    """Return the scenes and objects of a folder, searched recursively.

    A picture with transparent parts is an object; its class is its folder's name, or its own name directly in `folder`.
    All others are scenes. If no picture is transparent, smooth outlines are cut out of the scenes' centers, and each
    scene is a class.

    Raises:
        ConfigError: the folder or a scene is missing, or a file cannot be read.
    """
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not root.is_dir() or not paths:
        raise ConfigError(f"{root} is not a folder of photographs: it needs files that end in {', '.join(SUFFIXES)}")
    scenes, cutouts, names = [], [], []
    for path in paths:
        picture = _open(path)
        mask = _alpha(picture)
        name = path.stem if path.parent == root else path.parent.name
        if mask is None:
            scenes.append(picture.convert("RGB"))
            names.append(name)
        else:
            cutouts.append(_trimmed(name, picture.convert("RGB"), mask))
    if not scenes:
        raise ConfigError(f"{root} has only objects (pictures with transparent parts): add photographs as scenery")
    if not cutouts:
        cutouts = [_blob(name, scene, number) for number, (name, scene) in enumerate(zip(names, scenes, strict=True))]
    return Photographs(tuple(scenes), tuple(cutouts))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            picture = image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA", "P") else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as an image ({error}). Repair or remove it.") from error
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return picture


def _alpha(picture: Image.Image) -> Image.Image | None:
    """Return the object mask of a picture with transparent parts; None for an opaque one."""
    if picture.mode != "RGBA":
        return None
    mask = picture.getchannel("A").point([255 * (value > ALPHA_THRESHOLD) for value in range(256)])
    return mask if mask.getextrema() == (0, 255) else None


def _pixels(tenths: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Convert alternating x and y from tenths of a picture to pixels."""
    return [value * size[number % 2] / 10 for number, value in enumerate(tenths)]


def _trimmed(name: str, picture: Image.Image, mask: Image.Image) -> Cutout:
    box = mask.getbbox()
    return Cutout(name, picture.crop(box), mask.crop(box))


def _blob(name: str, scene: Image.Image, number: int) -> Cutout:
    """Cut out the center of a scene with a smooth outline: a circle with three waves of random amplitude."""
    rng = np.random.default_rng([7, number])
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    waves = sum(rng.uniform(0.05, 0.15) * np.sin(n * angles + rng.uniform(0, 2 * np.pi)) for n in (2, 3, 5))
    radius = 0.3 * min(scene.size) * (1 + waves)
    outline = np.stack([scene.width / 2 + radius * np.cos(angles), scene.height / 2 + radius * np.sin(angles)], axis=1)
    mask = Image.new("L", scene.size)
    ImageDraw.Draw(mask).polygon(outline.flatten().tolist(), fill=255)
    return _trimmed(name, scene, mask)
