"""dora-ray show."""

from __future__ import annotations

import argparse

from dora_ray import files
from dora_ray.checkpoints import CHECKPOINTS
from dora_ray.commands.output import write


def run(options: argparse.Namespace) -> None:
    """Draw what a teacher sees."""
    from dora_ray.evaluation.pictures import show

    out = options.out or _pictures_of(options.checkpoint)
    chosen = {"num_clips": options.clips, "seed": options.seed}
    result = show(
        options.checkpoint,
        options.video,
        out=out,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    write("\n".join([*result["pictures"], *result["movies"]]))


def _pictures_of(checkpoint: str) -> str:
    """Where the report of the checkpoint's run looks for pictures; for any other folder, `pictures` here."""
    if CHECKPOINTS in files.list_names(checkpoint) and not files.is_remote(checkpoint):
        return files.join(checkpoint, "pictures")
    return "pictures"
