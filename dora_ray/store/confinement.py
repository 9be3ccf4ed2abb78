"""Confines a process while it decodes what somebody else has made: no credentials, no memory without end.

A decoder is a large parser of hostile bytes. One that is tricked finds no keys in its process's environment, and one
that asks for too much memory fails alone, in place of the node. The time that it may take is the watchdog's matter.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_ray import files
from dora_ray.errors import VideoError

# Names of variables that hold secrets, of clouds and of whatever else runs beside.
SECRETS = re.compile(r"(?i)(secret|token|password|passwd|credential|api_?key|access_key|private_key|_auth\b)")
# What Ray's own connections are opened with: a worker that loses it in the middle cannot go on.
NEEDED = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@contextmanager
def confined(paths: Iterable[str], *, memory_bytes: int) -> Iterator[None]:
    """Decode without credentials in the environment, and with at most so much more memory than the process has.

    Where a path is behind a URI the credentials stay, since it is opened with them. Linux keeps the environment that a
    process began with in its memory: give credentials to nodes by their role, and there are none to find.

    Args:
        paths: what is read.
        memory_bytes: of address space, on top of what is mapped already.

    Raises:
        VideoError: the decoder asked for more.
    """
    hidden = {} if any(files.is_remote(path) for path in paths) else _hide()
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = _mapped_bytes()
    if mapped is not None:
        limit = mapped + memory_bytes
        most = limit if before[1] == resource.RLIM_INFINITY else min(limit, before[1])
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    except MemoryError as error:
        raise VideoError(
            f"{', '.join(paths)}: the decoder asked for more than {memory_bytes / 2**30:.1f} GiB, so the file is "
            "damaged or made to do harm"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        os.environ.update(hidden)


def _hide() -> dict[str, str]:
    """Take secrets out of the environment and return them."""
    names = [name for name in os.environ if SECRETS.search(name) and name not in NEEDED]
    return {name: os.environ.pop(name) for name in names}


def _mapped_bytes() -> int | None:
    """Address space of this process; None where the system does not limit it as Linux does."""
    if not sys.platform.startswith("linux"):
        return None
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
