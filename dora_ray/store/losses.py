"""Frames that a store lacks: reported, and refused above a limit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.store.datasets import count_frames
from dora_ray.store.frames import StoredVideo
from dora_ray.store.indexes import stored_index
from dora_ray.video.remarks import LOST_SECONDS

logger = logging.getLogger(__name__)


def missing_share(video: StoredVideo) -> float:
    """Return the share of a video's kept frames that are undecodable, or that damage may have reached."""
    return video.missing / (video.missing + len(video))


def missing_frames(videos: Sequence[StoredVideo]) -> Mapping[str, str]:
    """Return {path: number of missing frames, as text} of the videos with missing frames."""
    return {video.path: _sentence(len(video), video.missing) for video in videos if video.missing}


def losses(videos: Sequence[StoredVideo]) -> Mapping[str, str]:
    """Return {path: description} of the incomplete videos: missing frames, or a file whose end is lost."""
    frames, ends = missing_frames(videos), {video.path: _lost_end(video) for video in videos}
    texts = {video.path: "; ".join(filter(None, (frames.get(video.path), ends[video.path]))) for video in videos}
    return {path: text for path, text in texts.items() if text}


def _lost_end(video: StoredVideo) -> str:
    store = video.uri.rsplit("/", 2)[0]
    index = stored_index(store, video.video_id)
    if index is None or index.declared_seconds - index.real_seconds <= LOST_SECONDS:
        return ""
    lost = index.declared_seconds - index.real_seconds
    share = lost / index.declared_seconds
    return f"the file has lost its end: {lost:.1f} of {index.declared_seconds:.1f} s ({share:.1%})"


def stored_frames(store: str, video_id: str) -> list[str]:
    """Describe a video's stored frames, one sentence per format."""
    found = []
    for name in files.list_names(files.join(store, video_id)):
        if name.endswith(".lance"):
            readable, missing = count_frames(files.join(store, video_id, name))
            text = f"{name.removesuffix('.lance')}: {readable} frames"
            found.append(f"{text}; {_sentence(readable, missing)}" if missing else text)
    return found


def _sentence(readable: int, missing: int) -> str:
    total = readable + missing
    return (
        f"{missing} of {total} frames ({missing / total:.1%}) are missing: they cannot be decoded, or damage may have"
        " reached them"
    )


def whole_videos(
    videos: Sequence[StoredVideo], *, max_bad_fraction: float, skip_unreadable: bool = False
) -> list[StoredVideo]:
    """Return the videos that are complete enough, and warn of each incomplete one.

    Raises:
        VideoError: more than `max_bad_fraction` of a video's frames are missing; the message names all such videos.
            With `skip_unreadable`, such videos are left out, and the error is raised only if no video remains.
    """
    for path, text in missing_frames(videos).items():
        logger.warning("%s: %s", path, text)
    refused = [video for video in videos if missing_share(video) > max_bad_fraction]
    if len(refused) < len(videos) and (skip_unreadable or not refused):
        for video in refused:
            logger.warning("%s is left out (data.skip_unreadable)", video.path)
        return [video for video in videos if video not in refused]
    listed = "; ".join(f"{path}: {text}" for path, text in missing_frames(refused).items())
    raise VideoError(
        f"{listed}. More than data.max_bad_fraction={max_bad_fraction:g} allows; what could be decoded is stored. Get"
        f" the file{'s' if len(refused) > 1 else ''} again, leave {'them' if len(refused) > 1 else 'it'} out"
        " (data.skip_unreadable=true), or raise data.max_bad_fraction"
    )
