"""Video sources: find files by pattern, and open one as a container, local or remote."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import av
import fsspec
from av.container import Flags, InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from fsspec.core import url_to_fs

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.folders import is_hidden, visible_files
from dora_ray.remote import refusal

SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".ogv", ".gif"),
        *(".ts", ".m2ts", ".mts", ".mpg", ".mpeg"),
    )
)
PACKAGE = "package:"
# Codecs whose presentation times FFmpeg would generate in decoding order.
UNGUESSED_ORDER = frozenset(("h264", "hevc", "vvc"))
WHOLE_FILES = (
    "its server sends whole files only (no range requests), but a video is read in parts; download it and name the"
    " local file"
)
# Names that fsspec's file systems use for a file's tag and modification time.
STAMPS = ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "updated")


def find_videos(patterns: Sequence[str]) -> list[str]:
    """Return the video files that the patterns match, as absolute paths or URIs, sorted, each once.

    A pattern is a file, a folder (searched recursively for video suffixes, following links, without hidden files), a
    glob, a URI, or package:NAME/PATH for a file inside an installed Python package, which is located without importing
    it. If several paths lead to one local file, the shortest is taken.

    Raises:
        VideoError: a pattern matches nothing.
    """
    found = {path for pattern in patterns for path in _matches(pattern)}
    by_file: dict[str, str] = {}
    for path in sorted(found, key=lambda path: (len(path), path)):
        by_file.setdefault(path if files.is_remote(path) else os.path.realpath(path), path)
    return sorted(by_file.values())


def file_stamp(path: str) -> tuple[int, int]:
    """Return a file's size in bytes and modification time in ns, to detect changes.

    For a remote file the second value is a hash of the server's tag and modification time; 0 if it provides none.

    Raises:
        VideoError: the file cannot be accessed.
    """
    try:
        _check_there(path)
        if not files.is_remote(path):
            status = Path(path).stat()
            return status.st_size, status.st_mtime_ns
        filesystem, inner = url_to_fs(path)
        filesystem.invalidate_cache()
        facts = filesystem.info(inner)
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(_open_failure(path, error)) from error
    given = [str(facts[key]) for key in STAMPS if facts.get(key)]
    digest = hashlib.blake2b("|".join(given).encode(), digest_size=7).digest()
    return int(facts.get("size") or 0), int.from_bytes(digest, "big") if given else 0


def check_unchanged(path: str, size_bytes: int) -> None:
    """Check by size that the file on this node is still the one that was indexed.

    Modification times are not compared, because nodes may hold their own copies.

    Raises:
        VideoError: the size differs, or the file cannot be accessed.
    """
    size, _ = file_stamp(path)
    if size != size_bytes:
        raise VideoError(
            f"{path}: has {size} bytes, but had {size_bytes} when it was indexed: the file changed, or differs on"
            " this node; put the same file on every node, and start again"
        )


@contextmanager
def open_container(path: str) -> Iterator[InputContainer]:
    """Open the file as a PyAV container; remote files are read through fsspec.

    Raises:
        VideoError: the file is missing, empty, a folder, or unreadable for FFmpeg.
    """
    source: Any = path
    try:
        _check_there(path)
        if files.is_remote(path):
            source = _remote_file(path)
        container = av.open(source, metadata_errors="replace")
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(_open_failure(path, error)) from error
    try:
        yield container
    except Exception as error:
        # A server may stop answering midway; every other error is the caller's.
        reason = refusal(path, error)
        if reason is None:
            raise
        raise VideoError(f"{path}: {reason}") from error
    finally:
        container.close()
        if source is not path:
            source.close()


def _remote_file(path: str) -> Any:
    file = fsspec.open(path, "rb").open()
    if not file.seekable():
        file.close()
        raise VideoError(f"{path}: {WHOLE_FILES}")
    return file


def video_stream(container: InputContainer, path: str) -> VideoStream:
    """Return the stream to use, chosen as ffmpeg does: the largest default stream, else the largest.

    A single picture is chosen only if there is nothing else, a cover never. FFmpeg's generated presentation times are
    disabled where they would ignore the order of pictures.

    Raises:
        VideoError: a still picture, or audio only (a song's cover is not a video).
    """
    if "image2" in container.format.name or container.format.name.endswith("_pipe"):
        raise VideoError(f"{path}: is a still picture ({container.format.name}), not a video; name a video file")
    streams = film_streams(container)
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise VideoError(f"{path}: has no video stream (it holds: {kinds}); name a file with pictures")
    chosen = max([stream for stream in streams if stream.frames != 1] or streams, key=_ffmpeg_score)
    if chosen.codec_context.codec.canonical_name in UNGUESSED_ORDER:
        container.flags &= ~cast(int, Flags.gen_pts.value)
    return chosen


def film_streams(container: InputContainer) -> list[VideoStream]:
    """Return the video streams that FFmpeg can decode, without covers."""
    return [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]


def _ffmpeg_score(stream: VideoStream) -> int:
    """Score a stream as FFmpeg's program does (fftools/ffmpeg_mux_init.c); the first of equals wins."""
    context = stream.codec_context
    return context.width * context.height + 5_000_000 * bool(stream.disposition & Disposition.default)


def _check_there(path: str) -> None:
    if files.is_remote(path):
        return
    place = Path(path)
    if not place.exists():
        raise VideoError(f"{path}: no such file; check the path, on every node")
    if place.is_dir():
        raise VideoError(f"{path}: is a folder; name one video file")
    if not place.is_file():
        raise VideoError(f"{path}: is a pipe or a device, which cannot be read in parts; name a video file")
    if place.stat().st_size == 0:
        raise VideoError(f"{path}: is empty (0 bytes); get the file again")


def _open_failure(path: str, error: Exception) -> str:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    refused = refusal(path, error)
    if refused:
        return f"{path}: {refused}"
    if "range requests" in reason:
        return f"{path}: {WHOLE_FILES}"
    if isinstance(error, PermissionError):
        return f"{path}: may not be read ({reason}); check its permissions"
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file ({reason}); check the path"
    name = Path(path).name
    if name.startswith("._"):
        return f"{path}: is macOS metadata of {name[2:]}, not a video; name {name[2:]}"
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
        found = [str(path) for path in visible_files(place, SUFFIXES)]
        return found or _nothing(pattern, f"the folder holds no video ({' '.join(sorted(SUFFIXES))})")
    if os.path.exists(place):
        return [place]
    if not glob.has_magic(place):
        return _nothing(pattern, "no such file or folder")
    found = [p for p in glob.glob(place, recursive=True) if _is_video_name(p) and os.path.isfile(p)]
    return found or _nothing(pattern, "no video matches")


def _remote_matches(pattern: str) -> list[str]:
    try:
        filesystem, inner = url_to_fs(pattern)
        web = pattern.startswith(("http://", "https://"))
        # In a web address, a question mark starts the query string: a signature, a token.
        if glob.has_magic(inner.partition("?")[0] if web else inner):
            found = filesystem.glob(inner)
        elif web or not filesystem.isdir(inner):
            return [pattern]
        else:
            above = len(Path(inner).parts)
            found = [p for p in filesystem.find(inner) if not any(map(is_hidden, Path(p).parts[above:]))]
    except Exception as error:
        reason = refusal(pattern, error) or f"cannot be listed ({error}); check the address"
        raise VideoError(f"{pattern}: {reason}") from error
    videos = [str(filesystem.unstrip_protocol(p)) for p in found if _is_video_name(p)]
    return videos or _nothing(pattern, "no video there")


def _is_video_name(path: str) -> bool:
    """Return whether a name is a video's, and not a macOS sidecar file ._NAME.mp4, which some listings include."""
    place = Path(path)
    return place.suffix.lower() in SUFFIXES and not is_hidden(place.name)


def _inside_package(pattern: str) -> str:
    """Return the file system path of package:NAME/PATH."""
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
