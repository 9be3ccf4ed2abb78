"""clusters/local.yaml from `ray up` to `ray down`, on two machines that are namespaces of this one, with tokens."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.heads import BIN, ask, background, call, free_ports
from tests.cluster.machines import Machines, machines, missing

ROOT = Path(__file__).parents[1]
UP_SECONDS, JOIN_SECONDS = 600, 600


def edited(found: Machines, folder: Path) -> Path:
    """The file with the block that is to be edited, edited; nothing else of it is touched."""
    text = (ROOT / "clusters" / "local.yaml").read_text()
    before, _, rest = text.partition("\nmetadata:\n")
    block, _, after = rest.partition("\ncluster_name:")
    head, *workers = found.addresses
    for key, value in {
        "head": head,
        "workers": json.dumps(workers),
        "user": "root",
        "key": str(found.key),
        "path": f"echo 'export PATH={BIN}:$PATH PYTHONPATH={ROOT} RAY_worker_niceness=0' > ~/.dora-ray-env",
    }.items():
        block, count = re.subn(rf"(  {key}: &{key}) .*", lambda found, value=value: f"{found[1]} {value}", block)
        assert count == 1, key
    mine = folder / "local.yaml"
    mine.write_text(f"{before}\nmetadata:\n{block}\ncluster_name:{after}")
    return mine


@contextmanager
def tunnel(found: Machines, folder: Path) -> Iterator[str]:
    """The head's dashboard at a port of this machine."""
    (port,) = free_ports(1)
    command = found.ssh(found.addresses[0])
    command[-1:] = ["-N", "-L", f"{port}:127.0.0.1:8265", command[-1]]
    with background(command, dict(os.environ), folder / "tunnel.log"):
        deadline = time.monotonic() + 30
        while ask(f"http://127.0.0.1:{port}", None) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_from_ray_up_to_ray_down(small: tuple[str, ...], tmp_path: Path):
    home, token = tmp_path / "home", secrets.token_hex(32)
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(token)
    (home / ".ray" / "auth_token").chmod(0o600)
    laptop = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    laptop |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    laptop |= {"RAY_USAGE_STATS_ENABLED": "0"}
    run, project = tmp_path / "run", tmp_path / "project"
    project.mkdir()
    with machines(tmp_path, 2) as found:
        file = edited(found, tmp_path)
        up = call([str(BIN / "ray"), "up", "-y", "--no-config-cache", str(file)], laptop, timeout=UP_SECONDS)
        (tmp_path / "up.log").write_text(up.stdout + up.stderr)
        assert up.returncode == 0, up.stdout[-4000:] + up.stderr[-2000:]
        try:
            with tunnel(found, tmp_path) as url:
                assert ask(url, None) == 401, "without the token nobody gets in"
                assert ask(url, token) == 200
                _wait_for_raylets(found, found.addresses[1], 1)
                _both_nodes_are_well(url, laptop, run)
                words = ["train", "tiny", *small, "cluster.num_workers=2", "cluster.cpus_per_worker=1", "optim.steps=2"]
                words += ["--out", str(run), "--address", url, "--working-dir", str(project)]
                trained = call([str(BIN / "dora-ray"), "submit", *words], laptop, timeout=UP_SECONDS)
                assert trained.returncode == 0, trained.stdout[-4000:] + trained.stderr[-2000:]
        except AssertionError:
            monitor = found.ssh(found.addresses[0], "cat /tmp/ray/session_latest/logs/monitor.*")
            (tmp_path / "monitor.log").write_bytes(subprocess.run(monitor, capture_output=True, check=False).stdout)
            raise
        finally:
            down = call([str(BIN / "ray"), "down", "-y", str(file)], laptop, timeout=UP_SECONDS)
            (tmp_path / "down.log").write_text(down.stdout + down.stderr)
        assert down.returncode == 0, down.stdout + down.stderr
        assert "Stopped " in down.stdout, "the head's `ray stop`\n" + down.stdout + down.stderr
        for address in found.addresses:
            _wait_for_raylets(found, address, 0)
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def _wait_for_raylets(found: Machines, address: str, count: int) -> None:
    """The head's autoscaler starts one on each worker, over SSH; without their head they end by themselves."""
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        there = subprocess.run(found.ssh(address, "pgrep -x raylet"), capture_output=True, check=False).stdout.split()
        if len(there) == count:
            return
        assert time.monotonic() < deadline, f"{len(there)} raylets on {address}"
        time.sleep(1)


def _both_nodes_are_well(url: str, laptop: dict[str, str], run: Path) -> None:
    """`ray job submit` of the doctor, until the second node has joined."""
    said = ""
    command = [str(BIN / "ray"), "job", "submit", "--address", url, "--", "dora-ray", "doctor", str(run.parent)]
    deadline = time.monotonic() + JOIN_SECONDS
    while "nodes          2" not in said and time.monotonic() < deadline:
        said = call(command, laptop, timeout=UP_SECONDS).stdout
    assert "ok       nodes          2" in said, said[-4000:]
    assert "ok       versions" in said, said
    assert "ok       storage" in said, said
    assert "ok       dashboard      127.0.0.1:8265 answers 401 without a token" in said, said
