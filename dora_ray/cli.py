"""Command line: words -> Config -> one call of the API. Imports torch and ray only when a command needs them.

Exit status: 0 done, 1 failed, 2 bad configuration or usage, 3 bad data, 4 bad checkpoint, 5 not enough resources,
130 Ctrl-C. Expected errors (DoRAError) print one message; any other error is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from dora_ray import __version__
from dora_ray.commands.arguments import ENCODER, Commands, add_cluster_commands, add_eval
from dora_ray.commands.arguments import add_json as _add_json
from dora_ray.commands.arguments import command as _command
from dora_ray.commands.data_arguments import add_data
from dora_ray.errors import DoRAError

INTERRUPTED = 130
Handler = Callable[[argparse.Namespace], None]

_EXIT_STATUS = """\
exit status:
  0 done   1 failed   2 bad configuration or usage   3 bad data   4 bad checkpoint   5 not enough resources   130 Ctrl-C
"""
_OVERRIDES = "section.key=value, such as optim.steps=300; `dora-ray config` lists all keys"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parse(arguments)
    _log_to_stderr(verbose=options.verbose)
    module, function = options.handler.split(".")
    handler: Handler = getattr(import_module(f"dora_ray.commands.{module}"), function)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may not fit the terminal's encoding
    try:
        handler(options)
        sys.stdout.flush()
    except DoRAError as error:
        sys.stderr.write(f"dora-ray: {error}\n")
        return error.exit_status
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"dora-ray: {str(interrupt) or 'interrupted'}\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has exited. Without this, Python would raise again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; positional words such as key=value may come before, between and after options.

    argparse accepts a list of words in one place only; the leftover words are appended to the command's list.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words: list[str] | None = getattr(options, options.spill, None) if options.spill else None
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words.extend(rest)
    return options


def _log_to_stderr(*, verbose: bool) -> None:
    """Send log messages to stderr; stdout is for results."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("dora_ray")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dora-ray",
        description="Learn image encoders from long unlabeled videos with DoRA (Discover and tRAck), on Ray.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dora-ray {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="print debug messages to stderr")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_train,
        _add_sweep,
        add_eval,
        add_data,
        _add_show,
        _add_embed,
        _add_export,
        _add_report,
        _add_config,
        _add_bench,
        _add_status,
        _add_chaos,
        add_cluster_commands,
    ):
        add(commands)
    _add_completion(commands, parser)
    return parser


def _add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "train", "train an encoder; ingests the videos first if needed", spill="words")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | FILE.yaml | VIDEO | key=value",
        help=f"a recipe or a YAML file, videos, and {_OVERRIDES}. Quote special characters: "
        "'data.videos=[a.mp4, \"b [1].mp4\"]'. Without a recipe, one is chosen for this machine",
    )
    parser.add_argument("--out", metavar="DIR", help="folder or URI of the run (default: runs/<time>)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in DIR")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in DIR first")
    parser.add_argument("--dry-run", action="store_true", help="check everything and describe the run; write nothing")


def _add_sweep(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "sweep", "run the trials of a sweep file and report the results", spill="overrides")
    parser.add_argument("file", metavar="FILE.yaml", help="sweep file such as sweeps/objects.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"for all trials: {_OVERRIDES}; or metric=knn, seeds=[0,1]"
    )
    parser.add_argument("--out", metavar="DIR", help="folder or URI of the sweep (default: runs/sweep-<time>)")
    parser.add_argument("--resume", action="store_true", help="run the missing, new and failed trials in DIR")
    parser.add_argument(
        "--dry-run", action="store_true", help="forecast trials, disk and time from measured steps; write nothing"
    )


def _add_show(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "show", "draw the objects that a checkpoint's teacher discovers and tracks in a video")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=ENCODER)
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the pictures (default: the run's own `pictures`, shown by its report, with pictures of its "
        "first and a middle checkpoint too)",
    )
    parser.add_argument("--clips", type=int, metavar="N", help="number of clips to draw")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the clips and the attention heads")


def _add_embed(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "embed", "write an encoder's features of images or of a video's frames")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=ENCODER)
    parser.add_argument("data", metavar="DATA", help="an image, a video, or a folder of them")
    parser.add_argument("--out", metavar="FILE", required=True, help="new FILE.parquet or FILE.npz")
    parser.add_argument("--patches", action="store_true", help="also write the patch tokens")
    parser.add_argument("--whole", action="store_true", help="use the whole picture instead of its center square")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="input size of the encoder (default: as trained)")
    parser.add_argument("--fps", type=float, default=1.0, metavar="N", help="frames per second of a video (1)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="device such as cuda (cpu)")
    parser.add_argument("--skip-unreadable", action="store_true", help="skip images that cannot be read")


def _add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "export", "write a checkpoint's encoder as a timm model folder")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=ENCODER)
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")


def _add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "report", "write report.html into the folder of a run or a sweep")
    parser.add_argument("path", metavar="RUN_OR_SWEEP")


def _add_completion(commands: Commands[argparse.ArgumentParser], whole: argparse.ArgumentParser) -> None:
    parser = _command(commands, "completion", 'print a shell completion script: eval "$(dora-ray completion bash)"')
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(parser=whole)


def _add_config(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "config", "print a complete configuration with the meaning of every key", spill="words")
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE | FILE.yaml | key=value", help="configuration (default: the recipe paper)"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--schema", action="store_true", help="print the JSON schema instead")
    instead.add_argument(
        "--important", action="store_true", help="print the ten most important settings and their costs"
    )


def _add_bench(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "bench", "benchmark this machine against a naive implementation", spill="words")
    parser.add_argument(
        "what", choices=("data", "step", "stream"), help="reading clips, the training step, or the clip stream"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | FILE.yaml | key=value",
        help="configuration of the step (default: the recipe paper on a GPU, a smaller network on a CPU)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device of the step (default: a GPU if there is one)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    _add_json(parser)


def _add_status(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "status", "print the status of a run or a sweep")
    parser.add_argument("run", metavar="RUN_OR_SWEEP", help="folder or URI of the run or sweep")
    _add_json(parser)


def _add_chaos(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _command(commands, "chaos", "kill, drain, grow and damage small trainings, and check that nothing is lost")
    parser.add_argument(
        "--faults",
        metavar="NAME,...",
        help="worker_kill, node_kill, drain, join, checkpoint_kill, stall, resize_path, truncate, "
        "corrupt_segment, hung_decoder (default: all, one run each)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the steps and the victims (0)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="injections of each fault per run (1)")
    parser.add_argument(
        "--quick", action="store_true", help="one run for all faults (default faults: worker_kill, drain, join)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="also measure each worker fault with Ray Train's default recovery"
    )
    _add_json(parser)


if __name__ == "__main__":
    sys.exit(main())
