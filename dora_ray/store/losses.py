"""What a frame store lacks of a video, and which rules of decoding filled it: said aloud, and refused above a limit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from dora_ray import files
from dora_ray.errors import VideoError
from dora_ray.store.frames import StoredVideo, count_frames

logger = logging.getLogger(__name__)


def missing_share(video: StoredVideo) -> float:
    """Share of a video's kept frames that could not be decoded, or that damage may have reached."""
    return video.missing / (video.missing + len(video))


def losses(videos: Sequence[StoredVideo]) -> Mapping[str, str]:
    """{path: what is missing} of the videos that are not whole."""
    return {video.path: _sentence(len(video), video.missing) for video in videos if video.missing}


def stored_frames(store: str, video_id: str) -> list[str]:
    """What a store holds of a video, a sentence for each setting."""
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
    """Return the videos that are whole enough, and warn of each that is not whole.

    Raises:
        VideoError: more than `max_bad_fraction` of a video's frames are missing; all such videos are named. With
            `skip_unreadable`, which leaves them out, only where no video is left.
    """
    for path, text in losses(videos).items():
        logger.warning("%s: %s", path, text)
    refused = [video for video in videos if missing_share(video) > max_bad_fraction]
    if len(refused) < len(videos) and (skip_unreadable or not refused):
        for video in refused:
            logger.warning("%s is left out (data.skip_unreadable)", video.path)
        return [video for video in videos if video not in refused]
    listed = "; ".join(f"{path}: {text}" for path, text in losses(refused).items())
    raise VideoError(
        f"{listed}. More than data.max_bad_fraction={max_bad_fraction:g} allows; what could be decoded is stored. Get"
        f" the file{'s' if len(refused) > 1 else ''} again, leave {'them' if len(refused) > 1 else 'it'} out"
        " (data.skip_unreadable=true), or raise data.max_bad_fraction"
    )
