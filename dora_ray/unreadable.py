"""Report all unreadable files at once, or skip them with a warning."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dora_ray.errors import DoRAError

logger = logging.getLogger(__name__)

MOST_NAMED = 20


def report_unreadable(
    failures: Sequence[str], num_files: int, *, skip: bool, option: str, kind: type[DoRAError]
) -> None:
    """Report files that could not be read: as a warning if they are skipped, else as an error.

    Args:
        failures: A message for each of them.
        num_files: Number of all files.
        skip: Skip unreadable files.
        option: Name of the setting that skips them, such as "skip_unreadable".
        kind: Class of the error.

    Raises:
        DoRAError: Of class `kind`: some files are unreadable and not skipped, or all files are unreadable.
    """
    if not failures:
        return
    shown = " ".join(failure if failure.endswith(".") else f"{failure}." for failure in failures[:MOST_NAMED])
    more = f" And {len(failures) - MOST_NAMED} more." if len(failures) > MOST_NAMED else ""
    if skip and len(failures) < num_files:
        logger.warning("%d of %d files are skipped: %s%s", len(failures), num_files, shown, more)
        return
    count = f"{len(failures)} of {num_files} files: " if len(failures) > 1 else ""
    all_bad = len(failures) == num_files
    hint = "" if all_bad else f" {option}=true skips unreadable files."
    raise kind(f"{count}{shown}{more}{hint}")
