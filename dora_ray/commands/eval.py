"""dora-ray eval."""

from __future__ import annotations

import argparse
from typing import Any

from dora_ray.commands.output import write, write_json
from dora_ray.commands.words import split
from dora_ray.errors import ConfigError

RANDOM = "random:"


def run(options: argparse.Namespace) -> None:
    """Evaluate encoders, and random ones of the same architectures, and print a table."""
    from dora_ray.config_source import parse_override
    from dora_ray.evaluation import evaluate
    from dora_ray.evaluation.options import parse_options
    from dora_ray.evaluation.table import name_encoder, show_evaluations
    from dora_ray.evaluation.tasks import TASKS

    checkpoints, words = split(options.words)
    if not checkpoints:
        raise ConfigError(
            "no encoder was given: name a checkpoint, a run's folder, an export, a .pth file or timm:NAME, such as "
            f"`dora-ray eval {options.task} runs/dog --data DIR`"
        )
    settings = dict(parse_override(word) for word in words)
    parsed = parse_options(TASKS[options.task].options, options.task, settings)
    named = {}
    for given, source in _sources(checkpoints, random_init=parsed.random_init).items():
        own = settings | ({"random_init": True} if given.startswith(RANDOM) else {})
        found = evaluate(source, options.task, data=options.data, **own)
        named[name_encoder(given, found["checkpoint"])] = found
    random: dict[str, dict[str, Any]] = {}
    if options.random and not TASKS[options.task].beside:
        random = _random_encoders(named, options.task, options.data, settings)
    (first, *others) = named.values()
    content = {"encoders": [first, *others]} if others else first
    write(show_evaluations(named, random))
    write_json(options.json, {**content, "random": list(random.values())})


def _sources(checkpoints: list[str], *, random_init: bool) -> dict[str, str]:
    """Return the location of each encoder, by its word; all are resolved before the first one is evaluated.

    Raises:
        CheckpointError: an encoder does not exist, or timm cannot fetch it.
    """
    from dora_ray.checkpoints import TIMM, resolve_checkpoint
    from dora_ray.weights import load_backbone

    found = {given: resolve_checkpoint(given.removeprefix(RANDOM)) for given in checkpoints}
    for given, source in found.items():
        if source.startswith(TIMM) and not (random_init or given.startswith(RANDOM)):
            load_backbone(source)
    return found


def _random_encoders(
    named: dict[str, dict[str, Any]], task: str, data: str, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Evaluate a random encoder for each architecture that has none yet; return the results by name."""
    from dora_ray.evaluation import evaluate

    drawn = {evaluation["encoder"] for evaluation in named.values() if evaluation["settings"]["random_init"]}
    kinds = {evaluation["encoder"]: (name, evaluation["checkpoint"]) for name, evaluation in named.items()}
    found = {
        f"random encoder, as {name}": evaluate(source, task, data=data, **(settings | {"random_init": True}))
        for words, (name, source) in kinds.items()
        if words not in drawn
    }
    return found if len(kinds) > 1 else dict(zip(["random encoder"], found.values(), strict=False))
