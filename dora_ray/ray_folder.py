"""Check that Ray can make its sockets in the folder for temporary files, before Ray is started.

A socket's address is a path of at most 107 bytes (103 on macOS), and Ray puts its own below a folder named by the time.
Batch systems give jobs folders that leave no room for that.
"""

from __future__ import annotations

import os
import sys

from dora_ray.errors import ClusterError

LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
# The longest path that Ray makes in its folder: process numbers have seven digits at most.
LONGEST_NAME = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


def ray_folder() -> str:
    """Return the folder in which a Ray that is started here keeps its files, as Ray chooses it."""
    fallback = os.environ.get("TMPDIR", "/tmp") if sys.platform.startswith("linux") else "/tmp"
    return os.environ.get("RAY_TMPDIR", fallback)


def long_folder() -> str | None:
    """Return a sentence about a folder that is too long for Ray's sockets; None where it will do."""
    folder = ray_folder()
    longest = LONGEST_SOCKET - len(LONGEST_NAME) - 1
    length = len(os.fsencode(os.path.abspath(folder)))
    if length <= longest:
        return None
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    return f"{name}={folder} has {length} bytes; Ray's sockets leave room for {longest}. Set RAY_TMPDIR=/tmp"


def check_ray_folder() -> None:
    """Refuse to start Ray where its sockets could not be made.

    Raises:
        ClusterError: The folder for temporary files has too long a name.
    """
    sentence = long_folder()
    if sentence:
        raise ClusterError(f"Ray cannot be started here: {sentence}.")
