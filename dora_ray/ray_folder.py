"""Check, before Ray starts, that the path of its temporary folder is short enough for its sockets.

A socket's path has at most 107 bytes (103 on macOS), and Ray creates its own below a folder named after the time.
Temporary folders of batch systems are often too long for that.
"""

from __future__ import annotations

import os
import sys

from dora_ray.errors import ClusterError

LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
# Longest path that Ray creates in its folder; process ids have at most seven digits.
LONGEST_NAME = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


def ray_folder() -> str:
    """Return the temporary folder that Ray chooses when it is started on this machine."""
    fallback = os.environ.get("TMPDIR", "/tmp") if sys.platform.startswith("linux") else "/tmp"
    return os.environ.get("RAY_TMPDIR", fallback)


def long_folder() -> str | None:
    """Return a message if the folder's path is too long for Ray's sockets; else None."""
    folder = ray_folder()
    longest = LONGEST_SOCKET - len(LONGEST_NAME) - 1
    length = len(os.fsencode(os.path.abspath(folder)))
    if length <= longest:
        return None
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    return f"{name}={folder} has {length} bytes; Ray's sockets leave room for {longest}. Set RAY_TMPDIR=/tmp"


def check_ray_folder() -> None:
    """Refuse to start Ray if it could not create its sockets.

    Raises:
        ClusterError: The path of the temporary folder is too long.
    """
    sentence = long_folder()
    if sentence:
        raise ClusterError(f"Ray cannot start: {sentence}.")
