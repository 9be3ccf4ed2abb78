"""Files of runs and stores, on a local path or behind any fsspec URI (s3://, gs://, memory://).

A path is a plain string everywhere: "runs/a" and "s3://bucket/runs/a" go through the same functions.
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
    """Return whether the path names a URI other than file://."""
    text = os.fspath(path)
    return "://" in text and not text.startswith("file://")


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as every node and every working directory understands it: local paths become absolute."""
    text = os.fspath(path)
    return text if is_remote(text) else str(Path(text.removeprefix("file://")).expanduser().absolute())


def join(root: str | os.PathLike[str], *parts: str) -> str:
    """The path below `root`."""
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
    """Refusals of object stores, met by the function, as ConfigError."""

    @functools.wraps(function)
    def call(path: str | os.PathLike[str], /, *rest: Rest.args, **named: Rest.kwargs) -> Return:
        with named_refusals(os.fspath(path)):
            return function(path, *rest, **named)

    return call


@_named
def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether a file or folder is there."""
    filesystem, inner = _filesystem(path)
    return bool(filesystem.exists(inner))


@_named
def list_names(folder: str | os.PathLike[str]) -> list[str]:
    """Sorted names in a folder; empty when there is no such folder."""
    filesystem, inner = _filesystem(folder)
    filesystem.invalidate_cache()
    if not filesystem.isdir(inner):
        return []
    names = (Path(entry.rstrip("/")).name for entry in filesystem.ls(inner, detail=False))
    return sorted(name for name in names if name)


@_named
def make_folder(folder: str | os.PathLike[str]) -> None:
    """Create a folder and those above it."""
    filesystem, inner = _filesystem(folder)
    filesystem.makedirs(inner, exist_ok=True)


@_named
def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The file's content. Raises FileNotFoundError."""
    filesystem, inner = _filesystem(path)
    return bytes(filesystem.cat_file(inner))


def read_text(path: str | os.PathLike[str]) -> str:
    """The file's content as UTF-8."""
    return read_bytes(path).decode("utf-8")


@_named
def read_end(path: str | os.PathLike[str], size: int) -> str:
    """At most the last `size` bytes of a file, as text; empty when there is no file."""
    filesystem, inner = _filesystem(path)
    if not filesystem.exists(inner):
        return ""
    return bytes(filesystem.tail(inner, size)).decode("utf-8", errors="replace")


@_named
def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file so that a reader sees the old content or the new, never a part.

    Object stores put a file in one operation; on a local disk a temporary neighbor is flushed and renamed.
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
    """Write a whole UTF-8 file, as `write_bytes` does; names of files that are not UTF-8 are escaped."""
    write_bytes(path, content.encode("utf-8", errors="backslashreplace"))


@_named
def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or a whole folder; nothing happens when it is not there."""
    filesystem, inner = _filesystem(path)
    if filesystem.exists(inner):
        filesystem.rm(inner, recursive=True)


@_named
def move(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file or a whole folder another name on the same disk or in the same bucket."""
    filesystem, inner = _filesystem(source)
    filesystem.mv(inner, _filesystem(target)[1], recursive=True)


@_named
def copy_folder(source: str | os.PathLike[str], target: str) -> None:
    """Copy a whole folder to a local path that does not exist yet."""
    filesystem, inner = _filesystem(source)
    filesystem.invalidate_cache()
    filesystem.get(inner.rstrip("/") + "/", target.rstrip("/") + "/", recursive=True)


class LineFile:
    """Appends lines to a file that may live in an object store; safe to use from any thread.

    A local file is appended to, line by line. An object cannot be: there its earlier content is read once and the whole
    is put again by `flush`, which the caller does at checkpoints; lines since then are lost with the process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._remote = is_remote(self.path)
        self._lock, self._one_put = threading.Lock(), threading.Lock()
        # Of an object all of it, of a local file what could not be written yet.
        self._content = bytearray(read_bytes(self.path)) if self._remote and exists(self.path) else bytearray()
        if not self._remote:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            self._end_cut_line()

    def _end_cut_line(self) -> None:
        """A writer that was killed may have left half a line, which the next one must not continue."""
        with Path(self.path).open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")

    def append(self, line: str) -> None:
        """Add one line. On a disk that takes no more it is kept, and added with the next one."""
        with self._lock:
            self._content += (line + "\n").encode("utf-8")
            if not self._remote:
                with suppress(OSError):
                    self._write()

    def flush(self) -> None:
        """Make every line so far durable and visible to readers. Raises OSError where they cannot be written."""
        if not self._remote:
            with self._lock:
                self._write()
            with Path(self.path).open("ab") as file:
                os.fsync(file.fileno())
            return
        with self._one_put:  # or an older content could replace a newer one; `append` does not wait for the network
            with self._lock:
                content = bytes(self._content)
            write_bytes(self.path, content)

    def _write(self) -> None:
        if not self._content:
            return
        with Path(self.path).open("ab", buffering=0) as file:
            while self._content:
                del self._content[: file.write(self._content)]
