"""dora-ray show."""

from __future__ import annotations

import argparse
from pathlib import PurePosixPath

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS, complete_checkpoints
from dora_ray.commands.output import write


def run(options: argparse.Namespace) -> None:
    """Draw a teacher's attention and objects; for a run also those of its first and a middle kept checkpoint."""
    from dora_ray.evaluation.pictures import show

    chosen = {"num_clips": options.clips, "seed": options.seed}
    given = {name: value for name, value in chosen.items() if value is not None}
    out = options.out or _pictures_of(options.checkpoint)
    earlier = [] if options.out else _earlier(options.checkpoint)
    places = [(path, files.join(out, PurePosixPath(path).name)) for path in earlier]
    for checkpoint, folder in [*places, (options.checkpoint, out)]:
        result = show(checkpoint, options.video, out=folder, **given)
        write("\n".join([*result["pictures"], *result["movies"]]))


def _is_run(folder: str) -> bool:
    return CHECKPOINTS in files.list_names(folder) and not files.is_remote(folder)


def _pictures_of(checkpoint: str) -> str:
    """Return the folder where a run's report looks for pictures; for anything else, `pictures` in this folder."""
    return files.join(checkpoint, "pictures") if _is_run(checkpoint) else "pictures"


def _earlier(checkpoint: str) -> list[str]:
    """Return the first and a middle one of a run's complete checkpoints, without the last one."""
    kept = [*complete_checkpoints(files.join(checkpoint, CHECKPOINTS))][::-1] if _is_run(checkpoint) else []
    return [kept[index] for index in sorted({0, len(kept) // 2}) if index < len(kept) - 1]
