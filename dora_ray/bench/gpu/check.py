"""Runner of the check's parts: each has its own process and time limit, and keeps what it has measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from dora_ray.bench.gpu.figures import read_figures
from dora_ray.bench.gpu.table import render

# Seconds for each part, most valuable first. A rehearsal on a shared CPU takes longer.
LIMITS = {"tests": 120.0, "step": 150.0, "profile": 60.0, "learning": 240.0}
REHEARSAL_FACTOR = 5.0
# Share of the last part's time for each of its four trainings; the rest is for evaluation.
LEARNING_SHARE = 0.2
REHEARSED_SECONDS = 4.0
LOG_CHARACTERS = 1500


@dataclass(frozen=True)
class Settings:
    """Settings of a check.

    Attributes:
        out: folder of the results.
        clips: the clips file.
        rehearse: use small sizes, on a CPU.
        factor: multiplier of every part's time limit.
    """

    out: Path
    clips: Path
    rehearse: bool
    factor: float

    def seconds(self, part: str) -> float:
        """Return the time limit of a part."""
        return LIMITS[part] * self.factor


def main(words: Sequence[str], *, root: Path) -> int:
    """Run the parts named by the words, write gpu_check.json and gpu_check.txt, and print the table.

    Returns:
        0 if every part finished without failures, else 1.
    """
    options = _parse(words, root)
    rehearse = options.rehearse or not torch.cuda.is_available()
    factor = options.factor or (REHEARSAL_FACTOR if rehearse else 1.0)
    settings = Settings(options.out, options.clips, rehearse, factor)
    settings.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(root), "rehearsal": rehearse, "parts": {}}
    for part in options.parts:
        _tell(f"{part}: at most {settings.seconds(part):.0f} s ...")
        result["parts"][part] = run_part(part, settings, root=root)
        # Write and print after each part, so that results survive the loss of the machine.
        (settings.out / "gpu_check.json").write_text(json.dumps(result, indent=1) + "\n")
        (settings.out / "gpu_check.txt").write_text(render(result))
        _tell(render({**result, "parts": {part: result["parts"][part]}}, heading=False))
    _tell(render(result))
    return int(any(failures(one) for one in result["parts"].values()))


def failures(part: Mapping[str, Any]) -> list[str]:
    """Return the names of a part's failures: figures, tests, or the part itself."""
    found = [] if part["state"] == "done" else [part["state"]]
    for name, value in part["figures"].items():
        if isinstance(value, dict) and ("failed" in value or value.get("outcome") == "failed"):
            found.append(name)
    return found


def run_part(part: str, settings: Settings, *, root: Path) -> dict[str, Any]:
    """Run one part in its own process group, and kill the whole group when time is up."""
    limit, lines = settings.seconds(part), settings.out / f"{part}.jsonl"
    lines.unlink(missing_ok=True)
    log, began = settings.out / f"{part}.log", time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(
            command(part, settings, root=root),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(root, rehearse=settings.rehearse),
            cwd=root,
            start_new_session=True,
        )
        try:
            code = child.wait(limit)
            state = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            state = f"ended after its {limit:.0f} s"
        finally:
            _end(child)
    found = {"state": state, "seconds": round(time.monotonic() - began, 1), "figures": read_figures(lines)}
    lines.unlink(missing_ok=True)
    if state != "done":
        found["log"] = log.read_text(errors="replace")[-LOG_CHARACTERS:]
    return found


def command(part: str, settings: Settings, *, root: Path) -> list[str]:
    """Return the command line of a part's process."""
    words = [sys.executable, "-m", "dora_ray.bench.gpu", part, "--out", str(settings.out), "--root", str(root)]
    training = REHEARSED_SECONDS if settings.rehearse else settings.seconds(part) * LEARNING_SHARE
    words += ["--clips", str(settings.clips), "--seconds", str(training)]
    words += ["--rehearse"] if settings.rehearse else []
    return words


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the rest of a part's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _environment(root: Path, *, rehearse: bool) -> dict[str, str]:
    """Return the environment of a part; some variables must be set before torch is imported."""
    paths = [str(root), *sys.path[:1], os.environ.get("PYTHONPATH", "")]
    # On a shared machine, synchronized threads are many times slower than a single one.
    alone = {"OMP_NUM_THREADS": "1"} if rehearse else {}
    return (
        os.environ
        | alone
        | {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }
    )


def machine(root: Path) -> dict[str, Any]:
    """Describe the machine and commit of the measurement."""
    has_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if has_gpu else f"no GPU; {platform.processor() or platform.machine()}",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]),
    }
    if has_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory_mb": properties.total_memory / 2**20,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        }
    return found


def _output(words: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _parse(words: Sequence[str], root: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description="Run all GPU measurements.")
    kit = root / ".gpu-kit"
    parser.add_argument("--out", type=Path, default=root / "gpu-check", metavar="DIR", help="folder of the results")
    parser.add_argument("--clips", type=Path, default=kit / "clips.npz", metavar="FILE", help="made by make gpu-kit")
    parser.add_argument("--rehearse", action="store_true", help="use small sizes; implied without a GPU")
    parser.add_argument("--factor", type=float, metavar="X", help="multiplier of time limits (1; in a rehearsal 5)")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(LIMITS)}; default: all, in order")
    options = parser.parse_args(words)
    unknown = [part for part in options.parts if part not in LIMITS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: choose from {', '.join(LIMITS)}")
    options.parts = options.parts or list(LIMITS)
    options.out, options.clips = options.out.resolve(), options.clips.resolve()
    return options


def _tell(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()
