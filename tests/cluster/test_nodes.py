"""Facts about nodes: one in this process's cluster, and a cluster with a node that differs."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dora_ray.cluster.nodes import look_at_nodes, look_here
from dora_ray.video.sources import find_videos
from tests.cluster.heads import BIN, background, call, free_ports, ray_head
from tests.conftest import BIKES, SMALL


def test_unreadable_paths_are_reported(tmp_path):
    (tmp_path / "walk.mp4").write_bytes(b"film")
    found = look_here([str(tmp_path / "walk.mp4"), str(tmp_path / "other.mp4")])
    assert list(found["unreachable"]) == [str(tmp_path / "other.mp4")]
    assert found["versions"]["ray"].startswith("2.60")
    assert all(free > 0 for free in found["free_bytes"].values())


@pytest.mark.ray
def test_every_node_answers(ray_cluster, tmp_path):
    (facts,) = look_at_nodes([str(tmp_path), str(tmp_path / "nothing")])
    assert facts.problem is None
    assert facts.name.startswith("head ")
    assert list(facts.unreachable) == [str(tmp_path / "nothing")]
    assert abs(facts.clock_seconds) <= facts.clock_error + 0.5, "one machine has one clock"
    assert facts.object_store_bytes == 500_000_000
    assert look_at_nodes(elsewhere=True) == []


def _can_hide_folders() -> bool:
    command = ["unshare", "--mount", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not _can_hide_folders(), reason="needs the right to make mount namespaces (root)")
def test_an_odd_node_a_wrong_token_and_another_version_are_named(tmp_path):
    """The second node sees an empty folder in place of the film, and has another dora-ray."""
    videos, package = tmp_path / "videos", tmp_path / "odd" / "dora_ray-9.9.9.dist-info"
    videos.mkdir()
    shutil.copy(find_videos([BIKES])[0], videos / "walk.mp4")
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: dora-ray\nVersion: 9.9.9\n")
    doctor = [str(BIN / "dora-ray"), "doctor", str(videos / "walk.mp4"), "--address"]
    with ray_head(tmp_path, num_cpus=1) as head:
        odd = head.environment | {"PYTHONPATH": f"{package.parent}:{head.environment.get('PYTHONPATH', '')}"}
        with background(_hidden_node(videos, head.address), odd, tmp_path / "node.log"):
            said = ""
            for _ in range(20):  # until the node has joined
                # Ray's workers look for packages in the caller's folder first, where one may have been built.
                done = call([*doctor, head.address], head.environment, cwd=tmp_path)
                said = done.stdout
                if "nodes          2" in said:
                    break
                time.sleep(3)
            train = [str(BIN / "dora-ray"), "train", "tiny", *SMALL, f"data.videos=[{videos}/walk.mp4]"]
            train += ["cluster.num_workers=1", "--out", str(tmp_path / "run")]
            refused = call(train, head.environment | {"RAY_ADDRESS": head.address})
        assert done.returncode == 1, done.stderr
        assert "PROBLEM  versions" in said, done.stderr
        assert "9.9.9 on decode 127.0.0.2" in said, said
        assert f"not readable on decode 127.0.0.2: {videos}/walk.mp4: there is no such file" in said, said
        assert "ok       dashboard" in said, said
        assert refused.returncode == 5, refused.stderr
        assert f"decode 127.0.0.2 cannot read {videos}/walk.mp4: there is no such file" in refused.stderr
        _other_token_is_refused([*doctor, head.address], head.environment, tmp_path)


def _hidden_node(folder: Path, address: str) -> list[str]:
    agent, metrics = free_ports(2)
    start = (
        f"mount -t tmpfs none {folder} && exec {BIN}/ray start --block --address={address} --num-cpus=1 "
        f"--node-ip-address=127.0.0.2 --object-store-memory=100000000 --labels=role=decode --disable-usage-stats "
        f"--dashboard-agent-listen-port={agent} --metrics-export-port={metrics}"
    )
    return ["unshare", "--mount", "sh", "-c", start]


def _other_token_is_refused(command: list[str], environment: dict[str, str], folder: Path) -> None:
    (folder / "other").write_text(secrets.token_hex(32))
    done = call(command, environment | {"RAY_AUTH_TOKEN_PATH": str(folder / "other")})
    assert done.returncode == 5
    assert f"refuses this machine: the token of {folder}/other is not this cluster's" in done.stderr
