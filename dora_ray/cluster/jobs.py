"""Commands as jobs on a cluster: a thin layer over Ray's JobSubmissionClient."""

from __future__ import annotations

import asyncio
import importlib
import logging
import re
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dora_ray import files
from dora_ray.cluster.starting import explain_refusal, prepare_ray
from dora_ray.errors import ClusterError, ConfigError

logger = logging.getLogger(__name__)

# Left out of what is uploaded, whatever .gitignore says: data, results, secrets, environments.
EXCLUDES = (
    *(".git/", ".venv/", "venv/", "node_modules/", "__pycache__/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/"),
    *("runs/", "stores/", "store/", "checkpoints/", "tensorboard/", "demo-output/", "walking-tours/", "*.lance/"),
    *("*.mp4", "*.mkv", "*.webm", "*.mov", "*.avi", "*.ts", "*.m4v", "*.pt", "*.pth", "*.safetensors", "*.ckpt"),
    *(
        ".env",
        ".env.*",
        "*auth_token*",
        "*.pem",
        "*.key",
        "id_rsa*",
        "id_ed25519*",
        ".netrc",
        "credentials*",
        "*.token",
    ),
    *(".aws/", ".ssh/", ".ray/", ".config/", ".kube/", ".docker/", "application_default_credentials.json"),
)
# Folders that nobody wants to upload, whatever is left out.
TOO_WIDE = (Path("/"), Path.home())
LOST_SECONDS, RETRY_SECONDS = 120.0, 3.0
# What the dashboard says in the first seconds of a head, whose agent is still starting.
NO_AGENT = "No available agent"
PROGRESS = re.compile(r"[a-z ]+: [\d,]+(/[\d,]+)? \w+")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def prepare_command(words: Sequence[str], *, name: str) -> list[str]:
    """Return a command of dora-ray as it is run on the cluster, where it may be run again.

    A training gets a run folder, and --resume: submitted a second time, after the head was lost, it goes on from
    the newest checkpoint there instead of finding its folder in use.

    Args:
        words: the command, without `dora-ray`.
        name: of the job, which names a run's folder where none was given.
    """
    command = ["dora-ray", *words]
    if words[0] != "train" or "--dry-run" in words:
        return command
    out = next((word.partition("=")[2] for word in words if word.startswith("--out=")), None)
    if "--out" in words[:-1]:
        out = words[words.index("--out") + 1]
    if out is None:
        out = f"~/dora-ray/runs/{name}"
        command += ["--out", out]
    if not files.is_remote(out):
        logger.warning(
            "%s is a folder of the cluster's machines: all of them must share it, and after a lost head it must still "
            "be there to go on (--out s3://... or a shared file system)",
            out,
        )
    return command if {"--resume", "--overwrite"} & set(words) else [*command, "--resume"]


def new_name(words: Sequence[str]) -> str:
    """Return a name for a job, from its command and the time."""
    return f"{words[0]}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]


class Jobs:
    """The jobs of one cluster.

    Args:
        address: of the dashboard, as http://127.0.0.1:8265, which is where `ray dashboard` tunnels it to.

    Raises:
        ClusterError: nobody answers there, or the token is another.
    """

    def __init__(self, address: str) -> None:
        prepare_ray(starts=False)
        sdk: Any = importlib.import_module("ray.job_submission")
        self.address = address
        self._shown = 0  # characters of the log that is followed
        try:
            self._client = sdk.JobSubmissionClient(address)
        except Exception as error:  # requests' errors, Ray's, RuntimeError: what it raises is not said
            raise explain_refusal(address, error) from error

    def submit(self, command: Sequence[str], *, name: str, working_dir: str) -> None:
        """Upload a folder and start a command in it.

        Raises:
            ConfigError: the folder is a home, a whole disk, or too large.
            ClusterError: the cluster does not take it.
        """
        folder = Path(working_dir).expanduser().resolve()
        if folder in TOO_WIDE or not folder.is_dir():
            raise ConfigError(
                f"--working-dir {working_dir} is not a project's folder: give the one that holds your YAML files; all "
                "of it is uploaded, but for data, runs and secrets"
            )
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
        give_up = time.monotonic() + LOST_SECONDS
        while True:
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=name,
                    runtime_env={"working_dir": str(folder), "excludes": list(EXCLUDES)},
                    metadata={"name": name},
                )
                return
            except ValueError as error:  # larger than Ray uploads
                raise ConfigError(f"{folder} cannot be uploaded: {' '.join(str(error).split())[:400]}") from error
            except Exception as error:  # as above
                if NO_AGENT not in str(error) or time.monotonic() > give_up:
                    raise explain_refusal(self.address, error) from error
                time.sleep(RETRY_SECONDS)

    def follow(self, name: str, show: Callable[[str], None]) -> int:
        """Show a job's log until it ends, through interruptions of the connection, and return its exit status.

        Args:
            name: of the job.
            show: called with each part of the log, once.

        Raises:
            ClusterError: the cluster has not answered for two minutes.
        """
        self._shown, lost_at = 0, None
        while True:
            try:
                asyncio.run(self._tail(name, show))
                details = self._client.get_job_info(name)
            except (OSError, RuntimeError) as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > LOST_SECONDS:
                    raise ClusterError(
                        f"{self.address} has not answered for {LOST_SECONDS:.0f} s ({error}). The job may go on: open "
                        f"the tunnel again and `ray job logs --follow {name}`. If the head is lost, submit the same "
                        "command again on a new cluster: it goes on from the newest checkpoint in --out"
                    ) from error
                time.sleep(RETRY_SECONDS)
                continue
            lost_at = None
            if details.status.is_terminal():
                return _exit_status(details)
            time.sleep(1.0)

    async def _tail(self, name: str, show: Callable[[str], None]) -> None:
        """Show what is new in the log, until its end or the connection's."""
        seen = 0
        async for text in self._client.tail_job_logs(name):
            seen += len(text)
            if seen > self._shown:
                show(text[self._shown - seen :])
                self._shown = seen


def _exit_status(details: Any) -> int:
    """The command's own status where it ran; 1 where it was stopped or did not start."""
    if details.status == "SUCCEEDED":
        return 0
    if details.driver_exit_code:
        return int(details.driver_exit_code) if details.driver_exit_code > 0 else 128 - int(details.driver_exit_code)
    logger.error("%s", details.message or details.status)
    return 1
