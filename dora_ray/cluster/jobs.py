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

# Never uploaded, whatever .gitignore says: data, results, secrets, environments.
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
# Folders that are never uploaded, even with exclusions.
TOO_WIDE = (Path("/"), Path.home())
LOST_SECONDS, RETRY_SECONDS = 120.0, 3.0
# Dashboard error in a head's first seconds, while its agent is starting.
NO_AGENT = "No available agent"
PROGRESS = re.compile(r"[a-z ]+: [\d,]+(/[\d,]+)? \w+")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def prepare_command(words: Sequence[str], *, name: str) -> list[str]:
    """Return the dora-ray command to run on the cluster, where it may be run again.

    A training command gets a run folder and --resume. Submitted again after the head was lost, it resumes from the
    newest checkpoint in that folder instead of refusing a folder that holds a run.

    Args:
        words: the command, without `dora-ray`.
        name: name of the job, also used for the run's folder if none is given.
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
            "%s is a folder of the cluster's machines. All of them must share it, and it must outlive the head "
            "for the run to resume (--out s3://... or a shared file system)",
            out,
        )
    return command if {"--resume", "--overwrite"} & set(words) else [*command, "--resume"]


def new_name(words: Sequence[str]) -> str:
    """Return a name for a job, from its command and the time."""
    return f"{words[0]}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]


class Jobs:
    """Jobs of one cluster.

    Args:
        address: address of the dashboard, such as http://127.0.0.1:8265, to which `ray dashboard` tunnels it.

    Raises:
        ClusterError: the dashboard does not answer, or the token is wrong.
    """

    def __init__(self, address: str) -> None:
        prepare_ray(starts=False)
        sdk: Any = importlib.import_module("ray.job_submission")
        self.address = address
        self._shown = 0  # characters of the followed log
        try:
            self._client = sdk.JobSubmissionClient(address)
        except Exception as error:  # requests' errors, Ray's, RuntimeError: the set is undocumented
            raise explain_refusal(address, error) from error

    def submit(self, command: Sequence[str], *, name: str, working_dir: str) -> None:
        """Upload a folder and start a command in it.

        Raises:
            ConfigError: the folder is a home, a whole disk, or too large.
            ClusterError: the cluster rejects the job.
        """
        folder = Path(working_dir).expanduser().resolve()
        if folder in TOO_WIDE or not folder.is_dir():
            raise ConfigError(
                f"--working-dir {working_dir} is not a project folder: name the one that holds your YAML files. All "
                "of it is uploaded, except data, runs and secrets"
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
        """Show a job's log until it ends, reconnecting after interruptions, and return its exit status.

        Args:
            name: name of the job.
            show: called once with each part of the log.

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
                        f"{self.address} has not answered for {LOST_SECONDS:.0f} s ({error}). The job may still run: "
                        f"reopen the tunnel and `ray job logs --follow {name}`. If the head is lost, submit the same "
                        "command to a new cluster: it resumes from the newest checkpoint in --out"
                    ) from error
                time.sleep(RETRY_SECONDS)
                continue
            lost_at = None
            if details.status.is_terminal():
                return _exit_status(details)
            time.sleep(1.0)

    async def _tail(self, name: str, show: Callable[[str], None]) -> None:
        """Show new parts of the log, until the log or the connection ends."""
        seen = 0
        async for text in self._client.tail_job_logs(name):
            seen += len(text)
            if seen > self._shown:
                show(text[self._shown - seen :])
                self._shown = seen


def _exit_status(details: Any) -> int:
    """Return the command's own exit status; 1 if the job was stopped or did not start."""
    if details.status == "SUCCEEDED":
        return 0
    if details.driver_exit_code:
        return int(details.driver_exit_code) if details.driver_exit_code > 0 else 128 - int(details.driver_exit_code)
    logger.error("%s", details.message or details.status)
    return 1
