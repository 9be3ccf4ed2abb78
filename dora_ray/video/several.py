"""Index several videos; errors name every unreadable one, and unreadable ones can be skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dora_ray.errors import VideoError
from dora_ray.unreadable import report_unreadable
from dora_ray.video.index import VideoIndex


def index_all(
    paths: Sequence[str], read: Callable[[str], VideoIndex], *, skip_unreadable: bool = False
) -> list[VideoIndex]:
    """Return the index of each readable video, in order.

    Args:
        paths: paths of the videos.
        read: returns the index of one; raises VideoError if it cannot be used.
        skip_unreadable: leave out unreadable videos, with a warning.

    Raises:
        VideoError: names all unreadable videos; with `skip_unreadable`, only if no video remains.
    """
    found, failures = [], []
    for path in paths:
        try:
            found.append(read(path))
        except VideoError as error:
            failures.append(str(error))
    refuse_unreadable(failures, len(paths), skip_unreadable=skip_unreadable)
    return found


def refuse_unreadable(failures: Sequence[str], num_videos: int, *, skip_unreadable: bool) -> None:
    """Warn of skipped videos, or raise VideoError, as `index_all` does."""
    report_unreadable(failures, num_videos, skip=skip_unreadable, option="data.skip_unreadable", kind=VideoError)
