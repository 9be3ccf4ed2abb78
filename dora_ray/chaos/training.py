"""Training subject to faults: `dora-ray train` in its own process, as users start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dora_ray import files
from dora_ray.errors import DoRAError
from dora_ray.training.records.journal import METRICS, read_events, read_lines
from dora_ray.video.synthetic import make_video

# The recipe tiny, narrowed: the tests do not depend on the size of the networks.
SMALL = (
    "model.width=48",
    "model.depth=2",
    "crops.clip_size=40",
    "crops.global_size=32",
    "crops.local_size=16",
    "crops.num_locals=2",
    "tracking.num_iterations=5",
    "head.hidden_width=32",
    "head.bottleneck_width=16",
    "head.num_outputs=32",
    "optim.slots=4",
    "optim.clips_per_slot=2",
    "optim.freeze_last_layer_steps=1",
    "data.short_side=48",
    "data.frames_per_second=6",
    "data.segment_seconds=5",
    "run.log_every_steps=1",
    "run.keep_checkpoints=2",
    "cluster.threads_per_worker=1",
    "cluster.cpus_per_worker=2",
    "cluster.decode_cpus=1",
    "cluster.max_failures=-1",
    "cluster.resize_seconds=2",
    # On a shared machine, a worker's first step has taken a minute.
    "cluster.stall_seconds=90",
    "data.decode_seconds=8",
)
CLIPS_PER_SLOT = 2
POLL_SECONDS = 0.1
TAIL_CHARACTERS = 2000


class StalledError(DoRAError):
    """The training did not reach the awaited state in time."""


class EndedError(StalledError):
    """The training finished before reaching the awaited state."""


def make_training_video(folder: Path) -> Path:
    """Make forty seconds of video with a shot cut, and with a key frame every second to allow segments that short."""
    return make_video(
        folder / "video.mp4",
        width=128,
        height=96,
        num_frames=480,
        frames_per_second=12.0,
        seed=0,
        cuts=(200,),
        group_size=12,
    )


class Training:
    """One launch of a training, observed through the files of its run.

    Args:
        run: folder of the run.
        words: configuration overrides; empty when resuming.
        address: address of the Ray cluster; None in local mode.
        resume: resume the run.
    """

    def __init__(self, run: Path, words: tuple[str, ...], *, address: str | None, resume: bool = False) -> None:
        self.run = run
        self.log = run.with_name(f"{run.name}.log")
        command = [sys.executable, "-m", "dora_ray", "train", *words, "--out", str(run)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"OMP_NUM_THREADS": "1"} | ({"RAY_ADDRESS": address} if address else {})
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *(["--resume"] if resume else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of events.jsonl of one kind."""
        return [line for line in read_events(str(self.run)) if line["event"] == event]

    def steps(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of all attempts."""
        return [line for line in read_lines(files.join(self.run, METRICS)) if "step" in line]

    def done(self) -> int:
        """Return the number of steps done, according to the last metrics line."""
        return max((line["step"] for line in self.steps()[-1:]), default=0)

    def attempt(self) -> int:
        """Return the attempt that did the last step; 0 before the first."""
        return max((line["attempt"] for line in self.steps()[-1:]), default=0)

    def world_size(self) -> int:
        """Return the number of workers at the last step; 0 before the first."""
        return max((line["world_size"] for line in self.steps()[-1:]), default=0)

    def wait(self, what: str, condition: Callable[[], bool], *, seconds: float, poll: float = POLL_SECONDS) -> None:
        """Wait until a condition holds.

        Raises:
            StalledError: time ran out, or the training failed before; EndedError if it finished before.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None:
                raise (EndedError if self._process.returncode == 0 else StalledError)(
                    f"the training ended with status {self._process.returncode} before {what}: {self.tail()}"
                )
            if time.monotonic() > deadline:
                raise StalledError(f"{seconds:.0f} s passed without {what}: {self.tail()}")
            time.sleep(poll)

    def finish(self, *, seconds: float) -> int:
        """Wait for the exit status.

        Raises:
            StalledError: the training did not end in time.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise StalledError(f"the training did not end within {seconds:.0f} s: {self.tail()}") from error

    def kill(self) -> None:
        """Send SIGKILL to the launching process, if it is still running."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def tail(self) -> str:
        """Return the end of the training's output."""
        return self.log.read_text(errors="replace")[-TAIL_CHARACTERS:]
