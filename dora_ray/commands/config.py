"""dora-ray config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dora_ray.commands.output import write
from dora_ray.commands.words import load

if TYPE_CHECKING:
    from dora_ray.commands.important import Setting
    from dora_ray.config import Config


def run(options: argparse.Namespace) -> None:
    """Print an explained configuration, the important settings, or the JSON schema."""
    from dora_ray.config import Config

    if options.schema:
        write(json.dumps(Config.model_json_schema(), indent=2))
        return
    config = load(options.words or ["paper"])
    assert config is not None
    if options.important:
        from dora_ray.commands.important import important

        write("\n".join(_in_words(number, setting) for number, setting in enumerate(important(config), start=1)))
        return
    write("\n".join(_explained(config)))


def _in_words(number: int, setting: Setting) -> str:
    return f"{number:>2}. {setting.keys} = {setting.value}\n    {setting.advice}\n    Cost: {setting.cost}."


def _explained(config: Config) -> Iterable[str]:
    """Yield the lines of a YAML file for `load_config`, each key with a comment that explains it."""
    for section, values in config.model_dump(mode="json").items():
        part = getattr(config, section)
        yield f"{section}:  # {(type(part).__doc__ or '').strip()}"
        for key, value in values.items():
            meaning = type(part).model_fields[key].description or ""
            yield f"  {key}: {json.dumps(value)}  # {' '.join(meaning.split())}"
