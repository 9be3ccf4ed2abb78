"""Videos with a mask for each object and frame, laid out as DAVIS 2016 or 2017.

Legend: H x W pixels of a mask.

A mask's pixel says which object it is: 0 is the background, other values number the objects. They may stand in gray
levels, in a palette's numbers or in colors; a single object is mostly 255 or 1. Beside other objects, 255 marks pixels
that count for nobody (DAVIS 2017).
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
# The lists of the sequences that published scores are of: for the year, and as DAVIS 2016 was first given out.
LISTS = {"2017": ("2017/val.txt",), "2016": ("2016/val.txt", "480p/val.txt")}
VOID = 255
COLOR = 1 << 24  # above every gray level; a color's number is this and its red, green and blue
# Numbers of objects end far below: what has more is a picture, or a mask with soft edges.
MOST_OBJECTS = 100


@dataclass(frozen=True)
class Sequence:
    """A sequence's frames and masks, one mask a frame."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class Chosen:
    """The sequences that are scored.

    Attributes:
        sequences: In the order of their names.
        averaged: What the scores are means over, for people.
    """

    sequences: tuple[Sequence, ...]
    averaged: str


def find_sequences(folder: str | os.PathLike[str], *, year: str | None = None) -> list[Sequence]:
    """Return the sequences of `choose_sequences`."""
    return list(choose_sequences(folder, year=year).sequences)


def choose_sequences(folder: str | os.PathLike[str], *, year: str | None = None) -> Chosen:
    """Return the sequences of the folder's validation list, or all that have frames and masks where it has none.

    Args:
        folder: Laid out as DAVIS.
        year: "2016" or "2017", whose list must be there; None: the newest list that is there.

    Raises:
        ConfigError: Another layout, no list of that year, none of the listed sequences, or a sequence with unequal
            numbers of frames and masks, or with fewer than 3.
    """
    images, annotations = Path(folder, "JPEGImages", "480p"), Path(folder, "Annotations", "480p")
    if not images.is_dir() or not annotations.is_dir():
        raise ConfigError(f"{folder} is not laid out as DAVIS: {LAYOUT}.")
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
    """Return the validation list: of the year, or the newest.

    Raises:
        ConfigError: A year was named that has no list here.
    """
    years = LISTS if year is None else {year: LISTS[year]}
    paths = [folder / "ImageSets" / name for names in years.values() for name in names]
    found = next((path for path in paths if path.is_file()), None)
    if found is None and year is not None:
        raise ConfigError(f"year={year} asks for the sequences of {paths[0]}, which is not there; leave year out.")
    return found


def _listed_names(path: Path) -> set[str]:
    """Return the names in a list: one a line, or, as in DAVIS 2016, the paths of a frame and its mask."""
    words = (line.split()[0] for line in path.read_text().splitlines() if line.strip())
    return {Path(word).parent.name if "/" in word else word for word in words}


def _read_all(images: Path, annotations: Path, names: Items[str]) -> tuple[Sequence, ...]:
    return tuple(_read_sequence(name, images / name, annotations / name) for name in names)


def _read_sequence(name: str, images: Path, annotations: Path) -> Sequence:
    frames, masks = _visible(images, (".jpg", ".jpeg", ".png")), _visible(annotations, (".png",))
    if [path.stem for path in frames] != [path.stem for path in masks] or len(frames) < 3:
        raise ConfigError(
            f"{images} has {len(frames)} frames and {len(masks)} masks: a mask for each frame is needed, "
            "and 3 frames or more."
        )
    return Sequence(name, frames, masks)


def _visible(folder: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and not is_hidden(p.name)))


def read_masks(paths: Items[Path]) -> list[np.ndarray]:
    """Return the masks of a sequence, their values agreeing: where some are known by their colors alone, all are.

    Raises:
        ConfigError: As `read_mask`.
    """
    masks = [read_mask(path) for path in paths]
    colored = [bool((mask >= COLOR).any()) for mask in masks if mask.any()]
    if any(colored) and not all(colored):
        return [read_mask(path, by_color=True) for path in paths]
    return masks


def read_mask(path: Path, *, by_color: bool = False) -> np.ndarray:
    """Return a mask's values as (H, W) int32: gray levels, numbers of a palette, or for each color a number of its own.

    Args:
        path: The file.
        by_color: Take the colors where there are numbers, too.

    Raises:
        ConfigError: The file cannot be read as an image, or its values are not those of a mask.
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
            f"{path} holds {len(found)} values ({shown} ...), which are no numbers of objects (soft edges, JPEG?). "
            "Give 0 for the background and 1, 2 ... for the objects, or 255 for a single one."
        )
    return values


def _is_numbered(image: Image.Image) -> bool:
    """Tell masks whose values are numbers of objects from those that are pictures of them.

    A palette may be no more than a way to store colors: then black has any number but 0.
    """
    if image.mode != "P":
        return image.mode in ("1", "L") or image.mode.startswith("I")
    black = ~np.asarray(image.convert("RGB")).any(axis=-1)
    numbers_of_black = np.unique(np.asarray(image)[black])
    return len(numbers_of_black) == 0 or 0 in numbers_of_black


def _colors(image: Image.Image) -> np.ndarray:
    """Return (H, W) int32 values: one for each color, 0 for black and for what is transparent."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.int32)
    red, green, blue, alpha = np.moveaxis(pixels, -1, 0)
    color = (red << 16) + (green << 8) + blue
    return np.where((alpha == 0) | (color == 0), 0, COLOR + color)


@dataclass(frozen=True)
class Objects:
    """The objects of a sequence: those of its first mask.

    Attributes:
        values: The value of each object in the masks; where they are together, of all that are in the first mask.
        together: All objects count as one (DAVIS 2016).
    """

    values: tuple[int, ...]
    together: bool

    @classmethod
    def of(cls, first: np.ndarray, path: Path, *, together: bool) -> Objects:
        """Return the objects of a first mask (H, W).

        Raises:
            ConfigError: It has none.
        """
        found = [int(value) for value in np.unique(first) if value != 0]
        values = [value for value in found if value != VOID] or found
        if not values:
            raise ConfigError(f"{path} shows no object, and it is the mask that the objects are taken from.")
        return cls(tuple(values), together)

    @property
    def names(self) -> list[str]:
        """The objects for people: their numbers or colors in the masks, or "all"."""
        names = [str(value) if value < COLOR else f"#{value - COLOR:06x}" for value in self.values]
        return ["all"] if self.together else names

    def split(self, mask: np.ndarray) -> np.ndarray:
        """Turn a mask's values (H, W) into (K, H, W) bool, a mask for each object."""
        if self.together:
            return np.stack([(mask != 0) & ~self.void(mask)])
        return np.stack([mask == value for value in self.values])

    def void(self, mask: np.ndarray) -> np.ndarray:
        """Return the pixels (H, W) bool that count for nobody."""
        nobody: np.ndarray = mask == (VOID if VOID not in self.values else -1)
        return nobody
