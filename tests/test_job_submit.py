"""`ray job submit --working-dir . -- dora-ray train tiny` against a local `ray start --head` that asks for a token."""

from __future__ import annotations

import json
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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
START_SECONDS, JOB_SECONDS, STOP_SECONDS = 120, 400, 5


@dataclass(frozen=True)
class Head:
    """A Ray head of our own: the dashboard's address, and the environment that reaches it."""

    url: str
    environment: dict[str, str]
    token: str


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until all are found, so that none comes twice."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(url: str, token: str | None) -> int:
    """The status that the jobs API answers with; 0 when nobody answers."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/api/jobs/", headers=headers), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code)
    except OSError:
        return 0


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head started as cluster.yaml starts one: token, dashboard on loopback. Only its own processes are ended."""
    token, token_file = secrets.token_hex(32), tmp_path / "token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_worker_niceness": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    # Ray puts Unix sockets there, whose whole paths may have 107 characters: too few for a folder below tmp_path.
    folder = tempfile.mkdtemp(prefix="ray-")
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}", "--num-cpus=3",
        "--object-store-memory=300000000", "--disable-usage-stats", f"--temp-dir={folder}",
    ]  # fmt: skip
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while ask(url, token) != 200:
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield Head(url, environment, token)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the head, which ends what it started, and then whatever is left in the process group that is its own."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=STOP_SECONDS)


@pytest.mark.slow
@pytest.mark.ray
def test_a_submitted_job_trains(head: Head, small: tuple[str, ...], tmp_path: Path):
    assert ask(head.url, None) == 401, "without the token nobody gets in"
    working = tmp_path / "job"
    working.mkdir()
    (working / "mine.yaml").write_text("base: tiny\noptim: {lr: 2.0e-3}\n")
    run = tmp_path / "run"
    command = [str(BIN / "ray"), "job", "submit", "--address", head.url, "--working-dir", str(working), "--"]
    command += ["dora-ray", "train", "mine.yaml", *small, "cluster.num_workers=1", "optim.steps=2", "--out", str(run)]
    done = subprocess.run(
        command,
        env=head.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert str(run) in done.stdout, "what training prints reaches the submitter"
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000002"
    assert "lr: 0.002" in (run / "config.yaml").read_text()
