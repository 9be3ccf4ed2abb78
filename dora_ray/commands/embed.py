"""dora-ray embed."""

from __future__ import annotations

import argparse

from dora_ray.commands.output import write_facts
from dora_ray.progress import Stages


def run(options: argparse.Namespace) -> None:
    """Write the features of images or of a video."""
    from dora_ray.evaluation.embedding import embed

    with Stages() as stages:
        result = embed(
            options.checkpoint,
            options.data,
            out=options.out,
            patches=options.patches,
            whole=options.whole,
            image_size=options.size,
            frames_per_second=options.fps,
            device=options.device,
            skip_unreadable=options.skip_unreadable,
            progress=lambda done, total: stages.at("embed", "pictures").update(step=done, total=total),
        )
    write_facts(result)
