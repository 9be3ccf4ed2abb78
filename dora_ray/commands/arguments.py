"""Arguments of the command line: shared parts, evaluation, cluster commands."""

from __future__ import annotations

import argparse
from importlib import import_module

Commands = argparse._SubParsersAction  # argparse has no public name for this type


def command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    summary: str,
    *,
    handler: str = "",
    spill: str = "",
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Add a command's parser. The command runs `run` in the module of dora_ray.commands with the same name.

    `handler` selects another function, as module.function. `spill` names the list that collects positional words
    between and after the options. Without `add_help` the command adds its own help option.
    """
    description = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=description, add_help=add_help)
    parser.set_defaults(handler=handler or f"{name}.run", spill=spill)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the --json option."""
    parser.add_argument("--json", metavar="FILE", help="also write the result to this file as JSON")


def add_cluster_commands(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the commands that deal with machines and clusters."""
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
    parser.add_argument("--address", metavar="HOST:PORT", help="the cluster's head (default: RAY_ADDRESS, if set)")
    add_json(parser)


def _add_plan(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(commands, "plan", "estimate disk, time, cores, memory and bottleneck of a training", spill="words")
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE | FILE.yaml | key=value", help="as for train, with data.videos=[...]"
    )
    parser.add_argument(
        "--film", action="append", default=[], metavar="SPEC", help="describe a video instead: 6600s,3840x2160,60,vp9"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to train on (default: the recipe's workers)")
    parser.add_argument(
        "--cpus", type=float, metavar="N", help="cores for reading and decoding (default: this machine's)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs per node (8)")
    parser.add_argument(
        "--node-memory", type=float, metavar="GIB", help="memory of a training node (default: this machine's)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of a GPU (default: this machine's GPU, if any)"
    )
    parser.add_argument(
        "--interruptions", type=float, default=0.0, metavar="N", help="spot interruptions per node and hour (0)"
    )
    parser.add_argument(
        "--announced",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of interruptions with a notice, which lose no step (1)",
    )
    parser.add_argument(
        "--price-file", metavar="FILE", help="YAML file with currency, gpu_hour, cpu_hour (per core), storage_gb_month"
    )
    parser.add_argument(
        "--figures",
        action="append",
        default=[],
        metavar="FILE",
        help="output of `bench data --json` or `bench step --json`; may be repeated",
    )
    add_json(parser)


def _add_submit(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = command(commands, "submit", "run a command as a job on a cluster, show its log, exit with its status")
    submit_options(parser)
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="the command as without submit: train paper data.videos=[s3://...] --out s3://...; submitted again, a "
        "training continues from its newest checkpoint",
    )


def submit_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of `submit` itself, which may also appear among the words of the command."""
    # Absent options must not set defaults: the words are parsed a second time into the same namespace.
    defaults = {"address": None, "working_dir": ".", "name": None, "no_wait": False}
    parser.set_defaults(**defaults)
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--address", default=absent, metavar="URL", help="Ray dashboard (default: http://127.0.0.1:8265, a tunnel)"
    )
    parser.add_argument(
        "--working-dir", default=absent, metavar="DIR", help="folder to upload, except data, runs, secrets (default: .)"
    )
    parser.add_argument("--name", default=absent, metavar="NAME", help="job name (default: command and time)")
    parser.add_argument("--no-wait", action="store_true", default=absent, help="do not follow the log")
    return parser


ENCODER = "a checkpoint, a run's folder, an exported encoder, a file of weights (.pth), or timm:NAME"
_ENCODERS = f"{ENCODER}; random:CHECKPOINT uses random weights; several encoders share one table"
EVALUATIONS = ("knn", "linear", "corloc", "vos", "objects", "views")  # the keys of evaluation.tasks.TASKS


class _EvalHelp(argparse.Action):
    """Print the help with the options of one task or all tasks; imports the tasks only when needed."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = import_module("dora_ray.evaluation.tasks").describe_options(getattr(namespace, "task", None))
        parser.print_help()
        parser.exit()


def add_eval(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `eval`."""
    parser = command(commands, "eval", "evaluate frozen encoders in one table", spill="words", add_help=False)
    parser.add_argument("-h", "--help", action=_EvalHelp, nargs=0, help="show this help and the options of each task")
    parser.add_argument(
        "task",
        choices=EVALUATIONS,
        help="nearest neighbors, linear probe, object boxes, video object segmentation, the method's own masks, view "
        "matching",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CHECKPOINT | option=value",
        help=_ENCODERS,
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        required=True,
        help="knn, linear: labeled images, DIR/train/CLASS/* and DIR/test/CLASS/*; corloc: VOC folder; vos: DAVIS"
        " folder; objects: a tour made by `data synth`, or DAVIS; views: any video",
    )
    parser.add_argument(
        "--no-random", dest="random", action="store_false", help="do not evaluate random encoders for comparison"
    )
    add_json(parser)
