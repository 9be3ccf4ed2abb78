"""Node-local copies of frame-store datasets, for remote stores (object storage, network disks)."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
from pathlib import Path

from dora_ray import files
from dora_ray.errors import ConfigError

logger = logging.getLogger(__name__)


def local_copy(uri: str, identity: str, folder: str) -> str:
    """Return this node's copy of a dataset in `folder`; the first process that asks creates it.

    A copy never changes: `identity` is derived from the dataset's files, so a dataset that is re-ingested or extended
    gets another copy. Copies are never removed. If no copy can be made (full disk), warn and return the dataset's own
    URI.
    """
    place = hashlib.blake2b(uri.encode(), digest_size=6).hexdigest()
    target = Path(folder, f"{Path(uri).parent.name}-{Path(uri).stem}-{place}-{identity}.lance")
    try:
        if not target.exists():
            _copy_once(uri, target)
    except (OSError, ConfigError) as error:
        logger.warning("%s: no copy could be made (%s); reading frames from %s", target, error, uri)
        return uri
    return str(target)


def _copy_once(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # The kernel releases the lock when its process ends, however it ends; the lock file stays.
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                files.copy_folder(uri, str(partial))
                partial.rename(target)
            except BaseException:
                # On a full disk, half a copy would keep the disk full.
                shutil.rmtree(partial, ignore_errors=True)
                raise
