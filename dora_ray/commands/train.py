"""dora-ray train."""

from __future__ import annotations

import argparse
import os
import shlex

from dora_ray import files
from dora_ray.commands.output import write, write_facts
from dora_ray.commands.words import load, split
from dora_ray.errors import ConfigError


def run(options: argparse.Namespace) -> None:
    """Train, or with --dry-run describe the training."""
    from dora_ray.config import load_config
    from dora_ray.training.launch import check, saved_config, train

    names, overrides = split(options.words)
    if options.resume and not names:
        if options.out is None:
            raise ConfigError("--resume needs the run to continue: --out DIR")
        config = load_config(saved_config(files.absolute(options.out)), *overrides)
    else:
        found = load(options.words)
        if found is None:
            raise ConfigError(
                "no configuration was given: name a video, such as `dora-ray train walk.mp4`, or a recipe (paper, "
                "released, tiny) or YAML file before it"
            )
        config = found
    if options.dry_run:
        from dora_ray.planning.report import dry_run

        write(dry_run(config, check(config, out=options.out, resume=options.resume, overwrite=options.overwrite)))
        return
    result = train(config, out=options.out, resume=options.resume, overwrite=options.overwrite)
    shown = ("step", "loss", "object_agreement", "local_agreement", "knn", "clips_per_second")
    write_facts(
        {"run": result.path, "checkpoint": result.checkpoint}
        | {name: result.metrics[name] for name in shown if name in result.metrics}
    )
    path = shlex.quote(result.path)
    video = shlex.quote(config.data.videos[0]) if os.path.isfile(config.data.videos[0]) else "VIDEO"
    write(f"\nNext: dora-ray report {path}; dora-ray export {path} --out DIR; dora-ray show {path} {video}")
