"""Videos with object masks for each frame, in the layout of DAVIS 2016 or 2017.

Legend: H x W pixels of a mask.

Each pixel of a mask holds an object's number, 0 for the background. Numbers may be stored as gray levels, palette
indices or colors; a single object is usually 255 or 1. If there are several objects, 255 marks void pixels, which are
not scored (DAVIS 2017).
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dora_ray.errors import ConfigError
from dora_ray.folders import is_hidden

LAYOUT = (
    "FOLDER/JPEGImages/480p/SEQUENCE/00000.jpg, FOLDER/Annotations/480p/SEQUENCE/00000.png, and FOLDER/ImageSets/"
    "2017/val.txt or FOLDER/ImageSets/2016/val.txt if there is one"
)
# Validation lists, on which published scores are computed; DAVIS 2016 also in its first release's place.
LISTS = {"2017": ("2017/val.txt",), "2016": ("2016/val.txt", "480p/val.txt")}
VOID = 255
COLOR = 1 << 24  # offset of numbers made from colors (plus red, green and blue), above every gray level
# Real masks have far fewer objects: a file with more is a picture, or a mask with soft edges.
MOST_OBJECTS = 100


@dataclass(frozen=True)
class Sequence:
    """Frames and masks of a sequence, one mask per frame."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Chosen:
    """Sequences to score.

    Attributes:
        sequences: Sorted by name.
        averaged: Description, for the user, of the sequences that the scores are averaged over.
    """

    sequences: tuple[Sequence, ...]
    averaged: str


def find_sequences(folder: str | os.PathLike[str], *, year: str | None = None) -> list[Sequence]:
    """Return the sequences of `choose_sequences`."""
    return list(choose_sequences(folder, year=year).sequences)


def choose_sequences(folder: str | os.PathLike[str], *, year: str | None = None) -> Chosen:
    """Return the sequences of the folder's validation list; without a list, all that have frames and masks.

    Args:
        folder: Folder in the DAVIS layout.
        year: "2016" or "2017" for that year's list, which must exist; None: the newest list that exists.

    Raises:
        ConfigError: The layout is unknown, the year's list or all of its sequences are missing, or a sequence has
            unequal numbers of frames and masks, or fewer than 3.
    """
    images, annotations = Path(folder, "JPEGImages", "480p"), Path(folder, "Annotations", "480p")
    if not images.is_dir() or not annotations.is_dir():
        raise ConfigError(f"{folder} does not have the DAVIS layout: {LAYOUT}.")
    present = sorted(
        entry.name for entry in images.iterdir() if not is_hidden(entry.name) and (annotations / entry.name).is_dir()
    )
    if not present:
        raise ConfigError(f"{folder} holds no sequence with frames and masks: {LAYOUT}.")
    path = _list_file(Path(folder), year)
    if path is None:
        return Chosen(_read_all(images, annotations, present), f"all {len(present)} sequences (no ImageSets/*/val.txt)")
    listed = _listed_names(path)
    names = [name for name in present if name in listed]
    where = path.relative_to(folder)
    if not names:
        raise ConfigError(f"{path} lists {len(listed)} sequences, none of which has frames and masks in {folder}.")
    count = f"the {len(listed)}" if len(names) == len(listed) else f"{len(names)} of the {len(listed)}"
    return Chosen(_read_all(images, annotations, names), f"{count} sequences of {where}")


def _list_file(folder: Path, year: str | None) -> Path | None:
    """Return the validation list of the year, or the newest one.

    Raises:
        ConfigError: The list of the given year is missing.
    """
    years = LISTS if year is None else {year: LISTS[year]}
    paths = [folder / "ImageSets" / name for names in years.values() for name in names]
    found = next((path for path in paths if path.is_file()), None)
    if found is None and year is not None:
        raise ConfigError(f"year={year} needs {paths[0]}, which does not exist; leave year out.")
    return found


def _listed_names(path: Path) -> set[str]:
    """Read the names in a list: one per line or, as in DAVIS 2016, the paths of a frame and its mask."""
    words = (line.split()[0] for line in path.read_text().splitlines() if line.strip())
    return {Path(word).parent.name if "/" in word else word for word in words}


def _read_all(images: Path, annotations: Path, names: Items[str]) -> tuple[Sequence, ...]:
    return tuple(_read_sequence(name, images / name, annotations / name) for name in names)


def _read_sequence(name: str, images: Path, annotations: Path) -> Sequence:
    frames, masks = _visible(images, (".jpg", ".jpeg", ".png")), _visible(annotations, (".png",))
    if [path.stem for path in frames] != [path.stem for path in masks] or len(frames) < 3:
        raise ConfigError(
            f"{images} has {len(frames)} frames and {len(masks)} masks: it needs a mask for each frame, "
            "and at least 3 frames."
        )
    return Sequence(name, frames, masks)


def _visible(folder: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not is_hidden(p.name)))


def read_masks(paths: Items[Path]) -> list[np.ndarray]:
    """Read the masks of a sequence with consistent values: if some need to be read by color, all are.

    Raises:
        ConfigError: As `read_mask`.
    """
    masks = [read_mask(path) for path in paths]
    colored = [bool((mask >= COLOR).any()) for mask in masks if mask.any()]
    if any(colored) and not all(colored):
        return [read_mask(path, by_color=True) for path in paths]
    return masks


def read_mask(path: Path, *, by_color: bool = False) -> np.ndarray:
    """Read a mask's values as (H, W) int32: gray levels, palette indices, or a distinct number for each color.

    Args:
        path: The file.
        by_color: Use colors even if the file has indices.

    Raises:
        ConfigError: The file cannot be read as an image, or is not a mask.
    """
    try:
        with Image.open(path) as image:
            values = _colors(image) if by_color or not _is_numbered(image) else np.asarray(image).astype(np.int32)
    except Exception as error:  # on damaged files Pillow's readers raise errors of any kind
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} cannot be read as a mask ({reason}). Repair or remove it.") from error
    found = np.unique(values)
    soft = found[(found > MOST_OBJECTS) & (found < COLOR) & (found != VOID)]
    if len(found) > MOST_OBJECTS or len(soft):
        shown = ", ".join(map(str, (soft if len(soft) else found)[:5].tolist()))
        raise ConfigError(
            f"{path} holds {len(found)} values ({shown} ...), too many for object numbers (soft edges, JPEG?). "
            "Use 0 for the background and 1, 2 ... for the objects, or 255 for a single one."
        )
    return values


def _is_numbered(image: Image.Image) -> bool:
    """Return whether the pixel values are object numbers rather than colors.

    A palette may be a mere encoding of colors: then black has an index other than 0.
    """
    if image.mode != "P":
        return image.mode in ("1", "L") or image.mode.startswith("I")
    black = ~np.asarray(image.convert("RGB")).any(axis=-1)
    numbers_of_black = np.unique(np.asarray(image)[black])
    return len(numbers_of_black) == 0 or 0 in numbers_of_black


def _colors(image: Image.Image) -> np.ndarray:
    """Return (H, W) int32 values, one per color; 0 for black and transparent pixels."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.int32)
    red, green, blue, alpha = np.moveaxis(pixels, -1, 0)
    color = (red << 16) + (green << 8) + blue
    return np.where((alpha == 0) | (color == 0), 0, COLOR + color)


@dataclass(frozen=True)
class Objects:
    """Objects of a sequence, defined by its first mask.

    Attributes:
        values: Values of the objects in the masks.
        together: Treat all objects as one (DAVIS 2016).
    """

    values: tuple[int, ...]
    together: bool

    @classmethod
    def of(cls, first: np.ndarray, path: Path, *, together: bool) -> Objects:
        """Return the objects of a first mask (H, W).

        Raises:
            ConfigError: The mask is empty.
        """
        found = [int(value) for value in np.unique(first) if value != 0]
        values = [value for value in found if value != VOID] or found
        if not values:
            raise ConfigError(f"{path} shows no object, but the first mask defines the objects of its sequence.")
        return cls(tuple(values), together)

    @property
    def names(self) -> list[str]:
        """Names for the user: the objects' numbers or colors in the masks, or "all"."""
        names = [str(value) if value < COLOR else f"#{value - COLOR:06x}" for value in self.values]
        return ["all"] if self.together else names

    def split(self, mask: np.ndarray) -> np.ndarray:
        """Split a mask's values (H, W) into one mask per object, (K, H, W) bool."""
        if self.together:
            return np.stack([(mask != 0) & ~self.void(mask)])
        return np.stack([mask == value for value in self.values])

    def void(self, mask: np.ndarray) -> np.ndarray:
        """Return the void pixels (H, W) bool, which are not scored."""
        nobody: np.ndarray = mask == (VOID if VOID not in self.values else -1)
        return nobody
