"""A node's own copy of a dataset of the frame store, for stores that are far away (object stores, network disks)."""

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
    """Return this node's copy of a dataset below `folder`; the first process that asks makes it.

    A copy is never changed: `identity` names the dataset's files, so what is ingested anew, or added to, gets another.
    Copies are not removed. Where none can be made (a full disk), the dataset itself, with a warning.
    """
    place = hashlib.blake2b(uri.encode(), digest_size=6).hexdigest()
    target = Path(folder, f"{Path(uri).parent.name}-{Path(uri).stem}-{place}-{identity}.lance")
    try:
        if not target.exists():
            _copy_once(uri, target)
    except (OSError, ConfigError) as error:
        logger.warning("%s: no copy could be made (%s); frames are read from %s", target, error, uri)
        return uri
    return str(target)


def _copy_once(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # The lock ends with its process, whatever happens to it; the file stays.
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                files.copy_folder(uri, str(partial))
                partial.rename(target)
            except BaseException:
                # On a disk that is full, half a copy would keep it so.
                shutil.rmtree(partial, ignore_errors=True)
                raise
