"""Decoding of untrusted films: without the secrets of the process's environment, and with limited memory.

A film that exploits a decoder finds no credentials in its environment, and one that requests more memory than any
ordinary film is refused before the node runs out. This user's files and the cloud's metadata service remain in reach;
the cluster's images and roles must protect those (docs/cluster.md).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from dora_ray import files

# Nodes may hold other secrets than the submitting process: the common names are always blanked.
USUAL = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_API_KEY"),
    *("AZURE_CLIENT_SECRET", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN"),
    *("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("GITHUB_TOKEN", "GH_TOKEN", "GITLAB_TOKEN", "DATABASE_URL", "SSH_AUTH_SOCK"),
)
SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
# Memory that a task may add to its process: 16 reference frames of 8K at 16 bits, and as much again.
DECODE_BYTES = 8 * 2**30


def blanked(paths: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables to blank in a decode task; none if the task needs credentials to read.

    Ray's own variables stay, including its token, without which a worker cannot connect to its cluster.

    Args:
        paths: the films and the store.
        environment: environment of the submitting process.
    """
    if any(files.is_remote(path) for path in paths):
        return {}
    secret = {name for name in environment if SECRET.search(name) and not name.startswith("RAY_")}
    return dict.fromkeys(sorted({*USUAL, *secret}), "")


@contextmanager
def memory_limit(more_bytes: int = DECODE_BYTES) -> Iterator[None]:
    """Limit the memory that this process may add within the block, in bytes.

    Larger allocations fail instead of exhausting the node. Only Linux enforces a limit on the address space.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + more_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Return the bytes of address space that this process has mapped, including Ray's object store."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
