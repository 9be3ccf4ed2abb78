"""dora-ray plan."""

from __future__ import annotations

import argparse
import os

from dora_ray.commands.output import write, write_json
from dora_ray.commands.words import load
from dora_ray.errors import ConfigError


def run(options: argparse.Namespace) -> None:
    """Estimate the resources and time of a training, without running anything."""
    from dora_ray.planning.figures import load_figures
    from dora_ray.planning.model import Cluster
    from dora_ray.planning.report import GIB, Question, gpu_memory, load_prices, long_form, plan_of, this_machine
    from dora_ray.planning.workload import film_of, parse_film
    from dora_ray.training.inputs import check_videos

    config = load(options.words)
    if config is None:
        raise ConfigError("no configuration was given: name a recipe (paper, released, tiny) or a YAML file")
    films = [parse_film(text) for text in options.film] or [film_of(index) for index in check_videos(config)]
    gpus = options.gpus if options.gpus is not None else (config.max_workers if config.cluster.use_gpu else 0)
    if gpus < 0 or (options.cpus is not None and options.cpus <= 0):
        raise ConfigError(f"--gpus {gpus} --cpus {options.cpus}: --gpus must be at least 0, and --cpus above 0")
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
