"""Arguments of the command line: parts that all commands share, evaluation, and the commands about clusters."""

from __future__ import annotations

import argparse
from importlib import import_module

Commands = argparse._SubParsersAction  # argparse gives its type no public name


def command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    summary: str,
    *,
    handler: str = "",
    spill: str = "",
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """A command's parser; it is carried out by `run` of the module of dora_ray.commands with the command's name.

    `handler` names another module and function, as module.function; `spill` names the list that takes the words
    between and after the options; without `add_help` the command brings its own.
    """
    description = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(name, help=summary, description=description, add_help=add_help)
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
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of a GPU; not given: as here, if there is one")
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
        help="as without submit: train paper data.videos=[s3://...] --out s3://...; run again, the same line continues "
        "the training from its newest checkpoint",
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


ENCODER = "a checkpoint, a run's folder, an exported encoder, a file of weights (.pth), or timm:NAME"
_ENCODERS = f"{ENCODER}; random:CHECKPOINT draws its weights anew; several make one table"
EVALUATIONS = ("knn", "linear", "corloc", "vos", "objects", "views")  # as evaluation.tasks has them


class _EvalHelp(argparse.Action):
    """Print the help with the options of the task, or of all, which are looked up when they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = import_module("dora_ray.evaluation.tasks").describe_options(getattr(namespace, "task", None))
        parser.print_help()
        parser.exit()


def add_eval(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the evaluation of encoders."""
    parser = command(commands, "eval", "evaluate encoders, frozen, in one table", spill="words", add_help=False)
    parser.add_argument("-h", "--help", action=_EvalHelp, nargs=0, help="show this and every task's options")
    parser.add_argument(
        "task",
        choices=EVALUATIONS,
        help="neighbors, linear probe, boxes, video objects, the method's own masks, scenes known again",
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
        " folder; objects: a tour of `data synth` or DAVIS; views: any video",
    )
    parser.add_argument(
        "--no-random", dest="random", action="store_false", help="leave out the random encoders beside the given ones"
    )
    add_json(parser)
