"""Video indexes in a store, each in its video's folder."""

from __future__ import annotations

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.sources import file_stamp

INDEX_NAME = "index.npz"


def load_index(path: str, *, store: str) -> VideoIndex:
    """Return a video file's index: from the store if the file is unchanged, otherwise newly built and stored.

    Raises:
        VideoError: the file cannot be read.
    """
    path = files.absolute(path)
    if known := known_index(path, store=store):
        return known
    index = index_video(path)
    files.write_bytes(files.join(store, index.video_id, INDEX_NAME), index.to_bytes())
    return index


def known_index(path: str, *, store: str) -> VideoIndex | None:
    """Return a video file's stored index; None if there is none or the file has changed."""
    path = files.absolute(path)
    for name in files.list_names(store):
        known = stored_index(store, name) if name[:-8] == VideoIndex.name_of(path) + "-" else None
        if known and known.path == path and _same_file(known):
            return known
    return None


def stored_index(store: str, video_id: str) -> VideoIndex | None:
    """Return a video's index from the store; None if there is no readable one."""
    try:
        return VideoIndex.from_bytes(files.read_bytes(files.join(store, video_id, INDEX_NAME)))
    except (FileNotFoundError, ValueError):
        return None


def _same_file(index: VideoIndex) -> bool:
    try:
        return file_stamp(index.path) == (index.size_bytes, index.mtime_ns)
    except VideoError:
        return False
