"""Positional words of a command: recipe or file names, videos, and overrides of the form key=value."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dora_ray.config_source import QUOTED_VIDEOS, VIDEOS
from dora_ray.errors import ConfigError

if TYPE_CHECKING:
    from dora_ray.config import Config

logger = logging.getLogger(__name__)

OVERRIDE = re.compile(r"[A-Za-z_]+(\.[A-Za-z_]+)*=")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into names and overrides of the form key=value; an existing file is always a name."""
    overrides = [word for word in words if OVERRIDE.match(word) and not os.path.isfile(word)]
    return [word for word in words if word not in overrides], overrides


def load(words: Sequence[str]) -> Config | None:
    """Return the configuration given by a command's words; None if they name none.

    Names with a video suffix are the run's videos. Without a recipe, the machine decides.
    """
    from dora_ray.config import load_config

    names, overrides = split(words)
    _refuse_parts_of_a_name(names)
    videos = [name for name in names if _is_video(name)]
    names = [name for name in names if name not in videos]
    _refuse_videos_twice(videos, overrides)
    if len(names) > 1:
        hint = f"; to name videos, {QUOTED_VIDEOS}" if any(word.startswith(VIDEOS) for word in overrides) else ""
        raise ConfigError(
            f"{len(names)} recipes or files were given ({', '.join(names)}): "
            f"give one, and change it with section.key=value{hint}"
        )
    if not names and not videos and overrides:
        raise ConfigError(
            f"{overrides[0]} changes a configuration, but none was given: "
            "start with a recipe (paper, released, tiny) or a YAML file"
        )
    if videos:
        names = names or [_recipe_for_this_machine()]
        return load_config(names[0], {VIDEOS: videos}, *overrides)
    return load_config(names[0], *overrides) if names else None


def _refuse_videos_twice(videos: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise ConfigError if videos are given both as words and as data.videos."""
    given = [word for word in overrides if word.startswith(f"{VIDEOS}=")]
    if given and videos:
        raise ConfigError(f"{given[0]} and {' '.join(videos)}: name all videos the same way, as words (A.mp4 B.mp4)")


def _refuse_parts_of_a_name(words: Sequence[str]) -> None:
    """Raise ConfigError if several words together are the name of a file that was not quoted."""
    joined = " ".join(words)
    if len(words) > 1 and os.path.isfile(joined):
        raise ConfigError(
            f"{joined!r} was given as {len(words)} words: quote a name with spaces, {shlex.quote(joined)}"
        )


def _is_video(name: str) -> bool:
    from dora_ray.video.sources import SUFFIXES

    return os.path.splitext(name)[1].lower() in SUFFIXES


def _recipe_for_this_machine() -> str:
    """Return `paper` if there is a GPU, else `tiny`, and log the choice."""
    import torch

    if torch.cuda.is_available():
        logger.info(
            "No recipe was given: using paper, as this machine has a GPU (309,000 steps). `dora-ray plan` with the "
            "same words estimates the time; the recipe `tiny` takes minutes."
        )
        return "paper"
    logger.info(
        "No recipe was given: using tiny, as this machine has no GPU (a small network, minutes on two cores). The "
        "paper's recipe is `paper`."
    )
    return "tiny"
