"""dora-ray completion: a shell script that completes commands, options, recipes and configuration keys."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from dora_ray.commands.output import write

# $path grows by each word that is a subcommand; other words (files, values) leave it unchanged.
_SCRIPT = """\
_dora_ray_words() {{
    case "$1" in
{cases}
        *) return 1 ;;
    esac
}}
_dora_ray() {{
    local path="" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        if _dora_ray_words "$path $word" > /dev/null; then path="$path $word"; fi
    done
    COMPREPLY=($(compgen -W "$(_dora_ray_words "$path")" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    if [[ "${{COMPREPLY[0]}}" == *= ]]; then compopt -o nospace; fi
}}
complete -o default -F _dora_ray dora-ray
"""
_FOR_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    write((_FOR_ZSH if options.shell == "zsh" else "") + script(options.parser))


def script(parser: argparse.ArgumentParser) -> str:
    """Return the bash script for a parser and all its subcommands."""
    cases = [
        f"        {shlex.quote(path)}) echo {shlex.quote(' '.join(words))} ;;" for path, words in _known(parser, "")
    ]
    return _SCRIPT.format(cases="\n".join(cases))


def _known(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command's path and the words that may follow it."""
    from dora_ray.config import Config
    from dora_ray.config_section import keys_of
    from dora_ray.config_source import recipe_names

    words: list[str] = []
    for action in parser._actions:  # argparse has no public list of them
        words += [option for option in action.option_strings if option.startswith("--")]
        words += [] if action.option_strings or action.choices is None else list(action.choices)
        if isinstance(action.metavar, str) and action.metavar.startswith("RECIPE"):
            words += [*recipe_names(), *(f"{key}=" for key in keys_of(Config))]
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _known(below, f"{path} {name}")
    yield path, words
