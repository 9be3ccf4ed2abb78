"""Clusters started by `ray start`, with their own tokens: heads, and nodes that join them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
START_SECONDS, STOP_SECONDS = 600, 10
OWN_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR")


@dataclass(frozen=True)
class Head:
    """Ray head started for a test.

    Attributes:
        url: address of the dashboard.
        address: address of the control plane.
        environment: variables needed to reach it.
        token: token in `environment`'s file.
        folder: folder of its sessions.
        process: process of the head, in a group with all its children.
    """

    url: str
    address: str
    environment: dict[str, str]
    token: str
    folder: Path
    process: subprocess.Popen[bytes]


def free_ports(count: int) -> list[int]:
    """Return unused ports; all are held until all are found, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(url: str, token: str | None) -> int:
    """Return the status code of the jobs API; 0 if it does not answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/api/jobs/", headers=headers), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)
    except OSError:
        return 0


@contextmanager
def ray_head(folder: Path, *, num_cpus: int = 3, variables: dict[str, str] | None = None) -> Iterator[Head]:
    """Start a head as in cluster.yaml: token, dashboard on loopback. Only its own processes are killed."""
    token, token_file = secrets.token_hex(32), folder / "token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if key not in OWN_VARIABLES}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_worker_niceness": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    } | (variables or {})
    # Ray puts Unix sockets there, whose paths may have at most 107 characters: too few for a folder in tmp_path.
    sockets = tempfile.mkdtemp(prefix="ray-")
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}", f"--num-cpus={num_cpus}",
        "--object-store-memory=300000000", "--disable-usage-stats", f"--temp-dir={sockets}",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        with background(command, environment, folder / "head.log") as process:
            deadline = time.monotonic() + START_SECONDS
            while ask(url, token) != 200:
                assert process.poll() is None, (folder / "head.log").read_text()
                assert time.monotonic() < deadline, (folder / "head.log").read_text()
                time.sleep(0.5)
            yield Head(url, f"127.0.0.1:{gcs}", environment, token, Path(sockets), process)
    finally:
        for logs in Path(sockets).glob("session_2*/logs"):  # pytest keeps the folders of its last runs
            shutil.copytree(logs, folder / "logs", dirs_exist_ok=True)
        shutil.rmtree(sockets, ignore_errors=True)


@contextmanager
def background(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that ends with the block, along with all its children."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=STOP_SECONDS)


def call(
    words: Sequence[str], environment: dict[str, str], *, timeout: float = 900, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to completion."""
    return subprocess.run(
        list(words),
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
