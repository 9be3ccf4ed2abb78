"""Index several videos: all that cannot be read are named, and can be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dora_ray.errors import VideoError
from dora_ray.unreadable import report_unreadable
from dora_ray.video.index import VideoIndex


def index_all(
    paths: Sequence[str], read: Callable[[str], VideoIndex], *, skip_unreadable: bool = False
) -> list[VideoIndex]:
    """Return the index of each video that can be read, in their order.

    Args:
        paths: Of the videos.
        read: Gives the index of one; its VideoError says why it cannot be used.
        skip_unreadable: Leave out those that cannot be read, with a warning.

    Raises:
        VideoError: Naming all that cannot be read; with `skip_unreadable`, only where no video is left.
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
    """Warn of the videos that are left out, or raise VideoError, as `index_all` does."""
    report_unreadable(failures, num_videos, skip=skip_unreadable, option="data.skip_unreadable", kind=VideoError)
