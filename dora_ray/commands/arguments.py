"""Arguments of the command line: parts that all commands share, and the commands that are about clusters."""

from __future__ import annotations

import argparse

Commands = argparse._SubParsersAction  # argparse gives its type no public name


def command(
    commands: Commands[argparse.ArgumentParser], name: str, summary: str, *, handler: str = "", spill: str = ""
) -> argparse.ArgumentParser:
    """A command's parser; it is carried out by `run` of the module of dora_ray.commands with the command's name.

    `handler` names another module and function, as module.function; `spill` names the list that takes the words
    between and after the options.
    """
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(handler=handler or f"{name}.run", spill=spill)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option that writes the result to a file."""
    parser.add_argument("--json", metavar="FILE", help="write the result there as JSON too")


def add_cluster_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands about the machines that a run is on."""
    _add_doctor(commands)
    _add_plan(commands)
    _add_submit(commands)


def _add_doctor(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(
        commands,
        "doctor",
        "check this machine, and every node of a cluster: versions, GPUs, memory, decoders, disk, storage, security",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="videos, stores or runs that every node must reach")
    parser.add_argument("--address", metavar="HOST:PORT", help="the cluster's head; not given: RAY_ADDRESS, if set")
    add_json(parser)


def _add_plan(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(commands, "plan", "estimate disk, time, cores, memory, and what limits a training", spill="words")
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE | FILE.yaml | key=value", help="as for train, with data.videos=[...]"
    )
    parser.add_argument(
        "--film", action="append", default=[], metavar="SPEC", help="in place of videos: 6600s,3840x2160,60,vp9"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="that train; not given: the recipe's workers")
    parser.add_argument("--cpus", type=float, metavar="N", help="cores that read and decode; not given: this machine's")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument("--node-memory", type=float, metavar="GIB", help="of a training node; not given: as here")
    parser.add_argument(
        "--interruptions", type=float, default=0.0, metavar="N", help="spot interruptions of a node an hour (0)"
    )
    parser.add_argument(
        "--announced", type=float, default=1.0, metavar="SHARE", help="of them with a notice, which lose no step (1)"
    )
    parser.add_argument(
        "--price-file", metavar="FILE", help="YAML: currency, gpu_hour, cpu_hour (a core), storage_gb_month"
    )
    parser.add_argument(
        "--figures",
        action="append",
        default=[],
        metavar="FILE",
        help="of `bench data` or `bench step --json`",
    )
    add_json(parser)


def _add_submit(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(commands, "submit", "run a command as a job on a cluster, show its log, end as it ends")
    submit_options(parser)
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="as without submit: train paper data.videos=[s3://...] --out s3://...; again, a training goes on",
    )


def submit_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of `submit` itself, which may also stand among the words of the command."""
    # Nothing is set where an option is absent: the words are read a second time, into the same namespace.
    defaults = {"address": None, "working_dir": ".", "name": None, "no_wait": False}
    parser.set_defaults(**defaults)
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--address", default=absent, metavar="URL", help="of the dashboard; not given: http://127.0.0.1:8265, a tunnel"
    )
    parser.add_argument(
        "--working-dir", default=absent, metavar="DIR", help="uploaded but for data, runs and secrets; not given: here"
    )
    parser.add_argument("--name", default=absent, metavar="NAME", help="of the job; not given: command and time")
    parser.add_argument("--no-wait", action="store_true", default=absent, help="do not follow the log")
    return parser
