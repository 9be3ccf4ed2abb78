"""Explanations of refused connections, and the filter for Ray's token notice."""

from __future__ import annotations

import logging
import socket

import pytest

from dora_ray.cluster import starting
from dora_ray.errors import ClusterError
from dora_ray.ray_internals import token_logger
from tests.cluster.heads import free_ports


def test_without_a_listener_ray_init_is_not_called():
    """Ray itself would kill the process after a minute."""
    (port,) = free_ports(1)
    with pytest.raises(ClusterError, match=rf"127.0.0.1:{port}: nothing listens there"):
        starting.join_cluster(f"127.0.0.1:{port}")


def test_a_ray_that_does_not_start_is_no_traceback(monkeypatch):
    """Ray gives a busy machine 30 seconds, and then raises a plain Exception."""
    import ray

    def times_out(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", times_out)
    with pytest.raises(
        ClusterError, match=r"does not start on this machine: The current node timed out during startup\. "
    ):
        starting.start_cluster()


def test_a_token_that_is_not_the_clusters_is_named(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("other")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        said = str(starting.explain_refusal(address, ConnectionError(f"Failed to connect to Ray cluster at {address}")))
    assert "refuses this machine" in said
    assert str(tmp_path / "token") in said


@pytest.mark.parametrize(("address", "asked"), [("http://127.0.0.1:8265", True), ("10.0.0.1:6379", False)])
def test_a_closed_tunnel_is_thought_of_where_there_is_one(address, asked):
    said = str(starting.explain_refusal(address, RuntimeError("Failed to connect to Ray.")))
    assert said.startswith(f"no Ray cluster answers at {address}: Failed to connect to Ray")
    assert ("ssh -L" in said) is asked


def test_another_version_is_named():
    error = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.60.0\nThis process: 2.59.0")
    said = str(starting.explain_refusal("head:6379", error))
    assert "another version" in said
    assert "2.59.0" in said


def test_where_the_token_is_from(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert starting.token_source() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert starting.token_source() == str(tmp_path / ".ray" / "auth_token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert starting.token_source() == "RAY_AUTH_TOKEN"


def test_rays_notice_is_left_out_and_its_warnings_are_not(caplog):
    starting.prepare_ray(starts=True)
    logger = token_logger()
    with caplog.at_level(logging.WARNING, logger.name):
        logger.addHandler(caplog.handler)
        logger.warning("Token authentication is enabled for this Ray cluster. Set ...")
        logger.warning("Token authentication is disabled for this Ray cluster. Anyone with ...")
        logger.removeHandler(caplog.handler)
    assert {record.getMessage()[:34] for record in caplog.records} == {"Token authentication is disabled f"}


@pytest.mark.parametrize("mode", [None, "token", "disabled"])
def test_a_token_is_made_for_this_user_alone(tmp_path, monkeypatch, mode):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    starting.prepare_ray(starts=False)
    assert not path.exists(), "a cluster that is joined has one already"
    starting.prepare_ray(starts=True)
    if mode == "disabled":
        assert not path.exists()
        return
    made = path.read_text()
    assert len(made) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    starting.prepare_ray(starts=True)
    assert path.read_text() == made, "it is the cluster's, and stays"


def test_a_home_that_takes_no_file_leaves_it_to_ray(tmp_path, monkeypatch, caplog):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file" / "token"))
    starting.prepare_ray(starts=True)
    assert "cannot write a token" in caplog.text
