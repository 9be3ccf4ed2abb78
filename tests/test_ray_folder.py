"""A folder that is too long for Ray's sockets is found before Ray is started."""

from __future__ import annotations

import os
import sys

import pytest

from dora_ray import ray_folder
from dora_ray.config import load_config
from dora_ray.doctor.machine import examine
from dora_ray.errors import ClusterError
from dora_ray.store.ray_tasks import ray_cluster
from dora_ray.training.trainer import connect

LONG = "/scratch/slurm_jobdir/a-project-name/user.lastname/1355700"


@pytest.fixture
def long(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR" if sys.platform == "darwin" else "TMPDIR", LONG)


def test_the_limit_is_that_of_ray(monkeypatch):
    """The last length that is accepted gives a socket that Ray accepts, and one byte more does not."""
    from ray._private.utils import validate_socket_filepath

    longest = ray_folder.LONGEST_SOCKET - len(ray_folder.LONGEST_NAME) - 1
    for length, refused in ((longest, False), (longest + 1, True)):
        folder = "/" + "x" * (length - 1)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        assert (ray_folder.long_folder() is not None) == refused
        socket = os.path.join(folder, ray_folder.LONGEST_NAME)
        if refused:
            with pytest.raises(OSError, match="cannot exceed"):
                validate_socket_filepath(socket)
        else:
            validate_socket_filepath(socket)


def test_the_folder_is_the_one_that_ray_uses(monkeypatch, tmp_path):
    from ray._common.utils import get_default_system_temp_dir

    for names in ((), ("TMPDIR",), ("TMPDIR", "RAY_TMPDIR")):
        for name in ("TMPDIR", "RAY_TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        for name in names:
            monkeypatch.setenv(name, str(tmp_path / name))
        assert ray_folder.ray_folder() == get_default_system_temp_dir()


def test_a_long_name_counts_in_bytes(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/" + "é" * 20)
    assert "41 bytes" in str(ray_folder.long_folder())


def test_a_local_ray_is_not_started_in_a_long_folder(long, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests' cluster may run in this process
    config = load_config("tiny", "cluster.num_workers=1")
    for start in (ray_cluster, lambda: connect(config)):
        with pytest.raises(ClusterError, match=f"{LONG} has .* Set RAY_TMPDIR=/tmp"), start():
            pytest.fail("Ray was started")


def test_doctor_tells_of_a_long_folder(long, monkeypatch):
    found = {finding.name: finding for finding in examine()}["Ray's folder"]
    assert found.good is False
    assert LONG in found.text
    assert "RAY_TMPDIR=/tmp" in found.remedy
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert {finding.name: finding for finding in examine()}["Ray's folder"].good is True
