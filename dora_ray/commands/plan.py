"""dora-ray plan."""

from __future__ import annotations

import argparse
import os

from dora_ray.commands.output import write, write_json
from dora_ray.commands.words import load
from dora_ray.config_source import VIDEOS, recipe_names
from dora_ray.errors import ConfigError

# Smallest value of each number, and whether that value itself is allowed.
LEAST = {
    "gpus": (0, True),
    "cpus": (0, False),
    "gpus_per_node": (1, True),
    "node_memory": (0, False),
    "gpu_memory": (0, False),
    "interruptions": (0, True),
    "announced": (0, True),
}


def run(options: argparse.Namespace) -> None:
    """Estimate the resources and time of a training, without running anything."""
    from dora_ray.planning.figures import load_figures
    from dora_ray.planning.model import Cluster
    from dora_ray.planning.report import GIB, Question, gpu_memory, load_prices, long_form, plan_of, this_machine
    from dora_ray.planning.workload import film_of, parse_film
    from dora_ray.training.inputs import check_videos

    config = load(options.words)
    if config is None:
        raise ConfigError(f"no configuration was given: name a recipe ({', '.join(recipe_names())}) or a YAML file")
    _check_numbers(options)
    if not (options.film or config.data.videos):
        raise ConfigError(
            f"no video is named: give yours as {VIDEOS}=[walk.mp4], or describe one that you do not have yet, "
            "--film 6600s,3840x2160,60,vp9"
        )
    films = [parse_film(text) for text in options.film] or [film_of(index) for index in check_videos(config)]
    gpus = options.gpus if options.gpus is not None else (config.max_workers if config.cluster.use_gpu else 0)
    cluster = Cluster(
        workers=gpus or config.max_workers,
        gpus=gpus > 0,
        cores=options.cpus or os.cpu_count() or 1,
        workers_per_node=options.gpus_per_node if gpus else config.max_workers,
        interruptions=options.interruptions,
        announced=options.announced,
    )
    memory = options.node_memory * GIB if options.node_memory else this_machine()
    on_gpu = options.gpu_memory * GIB if options.gpu_memory else gpu_memory()
    prices = load_prices(options.price_file) if options.price_file else {}
    plan = plan_of(config, films, load_figures(options.figures), Question(cluster, memory, on_gpu, prices))
    taken = [
        name for name, given in (("--cpus", options.cpus), ("--node-memory", options.node_memory)) if given is None
    ]
    write(long_form(plan, cluster, taken=taken, currency=str(prices.get("currency", "cost"))))
    write_json(options.json, plan)


def _check_numbers(options: argparse.Namespace) -> None:
    for name, (least, itself) in LEAST.items():
        value = getattr(options, name)
        if value is not None and (value < least or (value == least and not itself)):
            allowed = f"at least {least}" if itself else f"above {least}"
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be {allowed}")
    if options.announced > 1:
        raise ConfigError(f"--announced {options.announced} is a share: from 0, none of the interruptions, to 1, all")
