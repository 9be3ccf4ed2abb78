"""Where videos come from: finding files by pattern, and opening one as a container, local or remote."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import fsspec
from av.container import InputContainer
from av.video.stream import VideoStream
from fsspec.core import url_to_fs

from dora_ray import files
from dora_ray.errors import VideoError

SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".ogv", ".gif"),
        *(".ts", ".m2ts", ".mts", ".mpg", ".mpeg"),
    )
)
PACKAGE = "package:"


def find_videos(patterns: Sequence[str]) -> list[str]:
    """Video files that the patterns name, as absolute paths or URIs, sorted, each once.

    A pattern is a file, a folder (searched to its bottom for video suffixes), a glob, a URI, or package:NAME/PATH for a
    file inside an installed Python package, which is located without importing it.

    Raises:
        VideoError: a pattern matches nothing.
    """
    found = {path for pattern in patterns for path in _matches(pattern)}
    return sorted(found)


def file_stamp(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns (0 where the file system has none): what tells a changed file."""
    if not files.is_remote(path):
        status = Path(path).stat()
        return status.st_size, status.st_mtime_ns
    filesystem, inner = url_to_fs(path)
    return int(filesystem.info(inner).get("size") or 0), 0


@contextmanager
def open_container(path: str) -> Iterator[InputContainer]:
    """The file as a PyAV container; remote files are read through fsspec.

    Raises:
        VideoError: the file is missing, empty, a folder, or nothing that FFmpeg reads.
    """
    source: Any = None
    try:
        _check_there(path)
        source = fsspec.open(path, "rb").open() if files.is_remote(path) else path
        container = av.open(source, metadata_errors="replace")
    except (OSError, av.FFmpegError) as error:
        raise VideoError(_open_failure(path, error)) from error
    try:
        yield container
    finally:
        container.close()
        if source is not path:
            source.close()


def video_stream(container: InputContainer, path: str) -> VideoStream:
    """The first moving-picture stream.

    Raises:
        VideoError: a still picture, or sound only (a song's cover is not a video).
    """
    if "image2" in container.format.name or container.format.name.endswith("_pipe"):
        raise VideoError(f"{path}: is a still picture ({container.format.name}), not a video; name a video file")
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise VideoError(f"{path}: has no video stream (it holds: {kinds}); name a file with pictures")


def _check_there(path: str) -> None:
    if files.is_remote(path):
        return
    place = Path(path)
    if not place.exists():
        raise VideoError(f"{path}: no such file; check the path, on every node")
    if place.is_dir():
        raise VideoError(f"{path}: is a folder, and one video file is wanted here")
    if place.stat().st_size == 0:
        raise VideoError(f"{path}: is empty (0 bytes); get the file again")


def _open_failure(path: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, PermissionError):
        return f"{path}: may not be read ({reason}); check its permissions or your credentials"
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file ({reason}); check the path"
    return (
        f"{path}: is not a video that FFmpeg can read ({reason}), or an MP4 whose end was cut off; get the file again"
    )


def _matches(pattern: str) -> list[str]:
    if pattern.startswith(PACKAGE):
        return _matches(_inside_package(pattern))
    if files.is_remote(pattern):
        return _remote_matches(pattern)
    place = files.absolute(pattern)
    if os.path.isdir(place):
        found = [str(p) for p in Path(place).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        return found or _nothing(pattern, f"the folder holds no video ({' '.join(sorted(SUFFIXES))})")
    if os.path.exists(place):
        return [place]
    if not glob.has_magic(place):
        return _nothing(pattern, "no such file or folder")
    found = [p for p in glob.glob(place, recursive=True) if Path(p).suffix.lower() in SUFFIXES and Path(p).is_file()]
    return found or _nothing(pattern, "no video matches")


def _remote_matches(pattern: str) -> list[str]:
    filesystem, inner = url_to_fs(pattern)
    try:
        if glob.has_magic(inner):
            found = filesystem.glob(inner)
        elif pattern.startswith(("http://", "https://")) or not filesystem.isdir(inner):
            return [pattern]
        else:
            found = filesystem.find(inner)
    except OSError as error:
        raise VideoError(f"{pattern}: cannot be listed ({error}); check the address and your credentials") from error
    videos = [str(filesystem.unstrip_protocol(p)) for p in found if Path(p).suffix.lower() in SUFFIXES]
    return videos or _nothing(pattern, "no video there")


def _inside_package(pattern: str) -> str:
    """The file system path of package:NAME/PATH."""
    name, _, inner = pattern.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise VideoError(f"{pattern}: the Python package {name!r} is not installed; install it, or name a file")
    folders = list(spec.submodule_search_locations or [])
    if not folders:
        raise VideoError(f"{pattern}: {name!r} is a single module without a folder of files; name another package")
    return str(Path(folders[0], inner))


def _nothing(pattern: str, reason: str) -> list[str]:
    raise VideoError(f"videos: {pattern!r}: {reason}; give a file, a folder, a glob, a URI or package:NAME/PATH")
