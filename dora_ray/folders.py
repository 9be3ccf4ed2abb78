"""Find files below a local folder, through linked folders, each folder once."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def visible_files(folder: str | os.PathLike[str], suffixes: Collection[str]) -> list[Path]:
    """Return the files whose suffix is one of those given, in lower case, to the bottom of a folder, sorted by path.

    Linked folders are entered, each folder once, whatever links lead to it, and never one that holds `folder` itself:
    that is a loop. Hidden files and folders are left out, and so the files `._NAME` that macOS puts beside NAME on
    other systems' disks. A link to a file that is gone is found too, so that whoever reads it says so.
    """
    found = [
        path
        for place in _folders(Path(folder))
        for path in place.iterdir()
        if path.suffix.lower() in suffixes and not is_hidden(path.name) and (path.is_file() or _is_broken(path))
    ]
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Tell a file or folder that people do not see and did not mean."""
    return name.startswith(".")


def _is_broken(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders to look into: those that are really below first, so that a link never takes their place."""
    above = set(root.resolve().parents)
    seen: set[Path] = set()
    linked = [root]
    while linked:
        waiting = [linked.pop(0)]
        while waiting:
            place = waiting.pop()
            real = place.resolve()
            if real in seen or real in above:
                continue
            seen.add(real)
            inner = _inner_folders(place)
            if inner is None:
                continue
            yield place
            linked += [path for path in inner if path.is_symlink()]
            waiting += [path for path in reversed(inner) if not path.is_symlink()]


def _inner_folders(place: Path) -> list[Path] | None:
    """Return the visible folders in a folder, by name; None, and a warning, for one that may not be read."""
    try:
        return sorted(path for path in place.iterdir() if not is_hidden(path.name) and path.is_dir())
    except OSError as error:
        logger.warning("%s is left out: it cannot be listed (%s)", place, error.strerror or error)
        return None
