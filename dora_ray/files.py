"""Files of runs and stores, at local paths or fsspec URIs (s3://, gs://, memory://).

Paths are plain strings: "runs/a" and "s3://bucket/runs/a" work with the same functions.
"""

from __future__ import annotations

import functools
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from fsspec.core import url_to_fs

from dora_ray.errors import ConfigError
from dora_ray.remote import named_refusals

Return = TypeVar("Return")
Rest = ParamSpec("Rest")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return whether the path is a URI other than file://."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def absolute(path: str | os.PathLike[str]) -> str:
    """Make a local path absolute, so that it is valid in any working directory; URIs are returned unchanged."""
    text = os.fspath(path)
    return text if is_remote(text) else str(Path(text.removeprefix("file://")).expanduser().absolute())


def join(root: str | os.PathLike[str], *parts: str) -> str:
    """Join path components."""
    text = os.fspath(root)
    return "/".join([text.rstrip("/"), *parts]) if is_remote(text) else str(Path(text, *parts))


def _filesystem(path: str | os.PathLike[str]) -> tuple[Any, str]:
    try:
        filesystem, inner = url_to_fs(os.fspath(path))
    except ImportError as error:
        hint = "pip install 'dora-ray[s3]' or 'dora-ray[gcs]'"
        raise ConfigError(f"{path} needs a package that is not installed ({error}): {hint}") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be opened: {error}. Use a local path, s3:// or gs://.") from error
    return filesystem, inner


def _named(
    function: Callable[Concatenate[str | os.PathLike[str], Rest], Return],
) -> Callable[Concatenate[str | os.PathLike[str], Rest], Return]:
    """Decorate a function to turn errors of object stores into ConfigError."""

    @functools.wraps(function)
    def call(path: str | os.PathLike[str], /, *rest: Rest.args, **named: Rest.kwargs) -> Return:
        with named_refusals(os.fspath(path)):
            return function(path, *rest, **named)

    return call


@_named
def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether a file or folder exists."""
    filesystem, inner = _filesystem(path)
    return bool(filesystem.exists(inner))


@_named
def list_names(folder: str | os.PathLike[str]) -> list[str]:
    """Return the sorted names in a folder; empty if it does not exist."""
    filesystem, inner = _filesystem(folder)
    filesystem.invalidate_cache()
    if not filesystem.isdir(inner):
        return []
    names = (Path(entry.rstrip("/")).name for entry in filesystem.ls(inner, detail=False))
    return sorted(name for name in names if name)


@_named
def make_folder(folder: str | os.PathLike[str]) -> None:
    """Create a folder and its parents."""
    filesystem, inner = _filesystem(folder)
    filesystem.makedirs(inner, exist_ok=True)


@_named
def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file; raise FileNotFoundError if it does not exist."""
    filesystem, inner = _filesystem(path)
    return bytes(filesystem.cat_file(inner))


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file."""
    return read_bytes(path).decode("utf-8")


@_named
def read_end(path: str | os.PathLike[str], size: int) -> str:
    """Read at most the last `size` bytes of a file as text; empty if it does not exist."""
    filesystem, inner = _filesystem(path)
    if not filesystem.exists(inner):
        return ""
    return bytes(filesystem.tail(inner, size)).decode("utf-8", errors="replace")


@_named
def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part.

    Object stores write a file in one operation; on a local disk a temporary file is flushed and renamed.
    """
    text = os.fspath(path)
    if is_remote(text):
        filesystem, inner = _filesystem(text)
        filesystem.pipe_file(inner, content)
        return
    target = Path(text.removeprefix("file://"))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write a UTF-8 file atomically; undecodable bytes, as in odd file names, are escaped."""
    write_bytes(path, content.encode("utf-8", errors="backslashreplace"))


@_named
def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or folder, if it exists."""
    filesystem, inner = _filesystem(path)
    if filesystem.exists(inner):
        filesystem.rm(inner, recursive=True)


@_named
def move(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Move a file or folder within the same disk or bucket."""
    filesystem, inner = _filesystem(source)
    filesystem.mv(inner, _filesystem(target)[1], recursive=True)


@_named
def copy_folder(source: str | os.PathLike[str], target: str) -> None:
    """Copy a folder to a local path that does not exist yet."""
    filesystem, inner = _filesystem(source)
    filesystem.invalidate_cache()
    filesystem.get(inner.rstrip("/") + "/", target.rstrip("/") + "/", recursive=True)


class LineFile:
    """Appends lines to a local file or an object; thread-safe.

    A local file is appended to line by line. Objects cannot be appended to: the existing content is read once, and
    `flush` writes all of it again. Callers flush at checkpoints; lines added since are lost if the process dies.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._remote = is_remote(self.path)
        self._lock, self._one_put = threading.Lock(), threading.Lock()
        # For an object its whole content, for a local file only the lines not written yet.
        self._content = bytearray(read_bytes(self.path)) if self._remote and exists(self.path) else bytearray()
        if not self._remote:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._end_cut_line()

    def _end_cut_line(self) -> None:
        """End a partial line that a killed writer may have left, so that the next line starts on its own."""
        with Path(self.path).open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")

    def append(self, line: str) -> None:
        """Add a line. If writing fails (full disk), it is buffered and written with the next one."""
        with self._lock:
            self._content += (line + "\n").encode("utf-8")
            if not self._remote:
                with suppress(OSError):
                    self._write()

    def flush(self) -> None:
        """Make all lines durable and visible to readers; raise OSError if that fails."""
        if not self._remote:
            with self._lock:
                self._write()
            with Path(self.path).open("ab") as file:
                os.fsync(file.fileno())
            return
        with self._one_put:  # prevents older content from replacing newer; `append` does not wait for the network
            with self._lock:
                content = bytes(self._content)
            write_bytes(self.path, content)

    def _write(self) -> None:
        if not self._content:
            return
        with Path(self.path).open("ab", buffering=0) as file:
            while self._content:
                del self._content[: file.write(self._content)]
