"""Find files below a local folder, following symbolic links, each folder once."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def visible_files(folder: str | os.PathLike[str], suffixes: Collection[str]) -> list[Path]:
    """Return the files below a folder with one of these suffixes (lower case), recursively, sorted by path.

    Symbolic links to folders are followed; each folder is visited once, and parents of `folder` never, which would be a
    loop. Hidden files and folders are skipped, including the `._NAME` files that macOS writes on foreign disks. Broken
    links are returned, so that the reader reports them.
    """
    found = [
        path
        for place in _folders(Path(folder))
        for path in place.iterdir()
        if path.suffix.lower() in suffixes and not is_hidden(path.name) and (path.is_file() or _is_broken(path))
    ]
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden."""
    return name.startswith(".")


def _is_broken(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders to search, real subfolders before linked ones, so that a link never hides a real path."""
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
    """Return the visible subfolders, sorted; log a warning and return None if the folder cannot be listed."""
    try:
        return sorted(path for path in place.iterdir() if not is_hidden(path.name) and path.is_dir())
    except OSError as error:
        logger.warning("%s is skipped: it cannot be listed (%s)", place, error.strerror or error)
        return None
