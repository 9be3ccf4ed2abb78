"""Node-local copies of remote videos, for decoders that read local files only."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fsspec.core import url_to_fs

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.remote import refusal
from dora_ray.video.index import VideoIndex

# Copies unused for this long are removed when the next one is made.
UNUSED_SECONDS = 24 * 3600.0
# Disk space to leave free beside a copy.
SPARE_BYTES = 1 << 30


def local_file(index: VideoIndex) -> str:
    """Return a local path of the video: its own, or that of a copy that the first process to ask creates.

    Copies live in the temporary folder (TMPDIR), shared by this user's processes on the node.

    Raises:
        VideoError: the file cannot be copied.
    """
    if not files.is_remote(index.path):
        return index.path
    folder = Path(tempfile.gettempdir(), f"dora-ray-videos-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    suffix = Path(index.path.partition("?")[0]).suffix
    target = folder / f"{index.video_id}-{index.size_bytes}-{index.mtime_ns}{suffix}"
    # The kernel releases the lock when its process ends, however it ends.
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _remove_unused(folder)
            _copy(index, target)
    with suppress(OSError):
        os.utime(target)
    return str(target)


def _copy(index: VideoIndex, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < index.size_bytes + SPARE_BYTES:
        raise VideoError(
            f"{index.path}: this decoder reads local files, and {target.parent} has {free / 1e9:.1f} GB free of the"
            f" {index.size_bytes / 1e9:.1f} GB needed; set TMPDIR to a larger disk, or use data.decoder=pyav"
        )
    partial = target.with_suffix(".partial")
    try:
        filesystem, inner = url_to_fs(index.path)
        filesystem.get_file(inner, str(partial))
        if partial.stat().st_size != index.size_bytes:
            raise VideoError(f"{index.path}: size changed since it was indexed; start again")
        partial.rename(target)
    except VideoError:
        raise
    except Exception as error:
        reason = refusal(index.path, error) or f"cannot be copied to {target.parent} ({error})"
        raise VideoError(f"{index.path}: {reason}; or use data.decoder=pyav, which reads it where it is") from error
    finally:
        partial.unlink(missing_ok=True)


def _remove_unused(folder: Path) -> None:
    for place in folder.iterdir():
        with suppress(OSError):
            if time.time() - place.stat().st_mtime > UNUSED_SECONDS:
                place.unlink()
