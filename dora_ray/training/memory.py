"""Memory of a training worker: how much it will need, and how to keep what it has."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for the next allocation, on Linux with glibc.

    By default it gives large blocks back at once, and the kernel hands out zeroed pages anew, several times for every
    activation of a step on the CPU. The process then stays as large as it ever was.

    Returns:
        Whether the allocator could be told so.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
