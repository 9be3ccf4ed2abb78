"""dora-ray submit."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import pairwise

from dora_ray.commands.arguments import submit_options
from dora_ray.commands.output import write
from dora_ray.commands.words import load
from dora_ray.errors import ConfigError, DoRAError


class JobError(DoRAError):
    """A job ended with an exit status other than 0."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"the job {name} ended with status {status}; its log is above (ray job logs {name})")
        self.exit_status = status


def run(options: argparse.Namespace) -> None:
    """Run a command on a cluster, show its output, and exit with its status."""
    from dora_ray.cluster.jobs import DEFAULT_ADDRESS, Jobs, new_name, prepare_command

    parser = submit_options(argparse.ArgumentParser(prog="dora-ray submit", add_help=False, allow_abbrev=False))
    options, words = parser.parse_known_args(options.words, options)
    if not words:
        raise ConfigError(
            "no command was given, such as: dora-ray submit train paper data.videos=[s3://...] --out s3://..."
        )
    if words[0] == "train":
        _check(words[1:], options.working_dir)
    name = options.name or new_name(words)
    jobs = Jobs(options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    command = prepare_command(words, name=name)
    jobs.submit(command, name=name, working_dir=options.working_dir)
    write(f"submitted {name}: {' '.join(command)}")
    where = f"--address {jobs.address}"
    if options.no_wait:
        write(f"Follow: ray job logs --follow {where} {name}; stop: ray job stop {where} {name}")
        return
    try:
        status = jobs.follow(name, Log().show)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nThe job keeps running. To save a checkpoint and stop it: ray job stop {where} {name}\n")
        raise
    if status:
        raise JobError(name, status)


def _check(words: list[str], working_dir: str) -> None:
    """Check a training's configuration before the upload; paths are relative to the working directory."""
    before = os.getcwd()
    os.chdir(working_dir)
    try:
        load([word for word in words if not word.startswith("-") and word not in _values_of_options(words)])
    finally:
        os.chdir(before)


def _values_of_options(words: list[str]) -> set[str]:
    return {after for word, after in pairwise(words) if word == "--out"}


class Log:
    """Prints a job's log on this terminal; progress lines overwrite each other."""

    def __init__(self) -> None:
        self._rest = ""
        self._over = False

    def show(self, text: str) -> None:
        """Write the complete lines received so far."""
        from dora_ray.cluster.jobs import PROGRESS

        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            progress = sys.stdout.isatty() and PROGRESS.match(line) is not None
            sys.stdout.write(("\r\x1b[K" if self._over else "") + line + ("" if progress else "\n"))
            self._over = progress
        sys.stdout.flush()
