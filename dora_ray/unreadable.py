"""Name all files that cannot be read at once, and go on without them where that is wanted."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dora_ray.errors import DoRAError

logger = logging.getLogger(__name__)

MOST_NAMED = 20


def report_unreadable(
    failures: Sequence[str], num_files: int, *, skip: bool, option: str, kind: type[DoRAError]
) -> None:
    """Name the files that could not be read: in a warning where they are left out, else in an error.

    Args:
        failures: A sentence for each of them.
        num_files: All files.
        skip: Leave them out.
        option: Setting that leaves them out, such as "skip_unreadable".
        kind: Class of the error.

    Raises:
        DoRAError: Of that kind: there are some, and they are not to be left out, or they are all.
    """
    if not failures:
        return
    shown = " ".join(failure if failure.endswith(".") else f"{failure}." for failure in failures[:MOST_NAMED])
    more = f" And {len(failures) - MOST_NAMED} more." if len(failures) > MOST_NAMED else ""
    if skip and len(failures) < num_files:
        logger.warning("%d of %d files are left out: %s%s", len(failures), num_files, shown, more)
        return
    count = f"{len(failures)} of {num_files} files: " if len(failures) > 1 else ""
    all_bad = len(failures) == num_files
    hint = "" if all_bad else f" {option}=true leaves out what cannot be read."
    raise kind(f"{count}{shown}{more}{hint}")
