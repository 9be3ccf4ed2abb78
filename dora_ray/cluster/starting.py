"""Preparation for starting or joining Ray: its folder, its token, and explanations of refusals."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from dora_ray.errors import ClusterError
from dora_ray.ray_folder import check_ray_folder
from dora_ray.ray_internals import token_logger

logger = logging.getLogger(__name__)

AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
CONNECT_SECONDS, TOKEN_BYTES = 10.0, 32
# Settings of a Ray cluster that is started here.
SYSTEM_CONFIG = {
    # Ray ends an idle process after a second if there are more processes than cores, actors included. On a laptop, that
    # hits every decode process between two tasks, and each new one imports for seconds.
    "num_workers_soft_limit": 64,
    # Tasks that the head keeps for the dashboard, 7 KB each; Ray's default of 100,000 takes 700 MB.
    "task_events_max_num_task_in_gcs": 10_000,
}


def prepare_ray(*, starts: bool) -> None:
    """Check the folder of Ray's sockets, and hide Ray's token notice.

    A Ray that is started here uses token authentication by default; if there is no token yet, one is created that only
    this user can read. To join a cluster, the token found here is used. RAY_AUTH_MODE=disabled turns authentication
    off, and `dora-ray doctor` reports that.

    Args:
        starts: start Ray here; otherwise join a cluster.

    Raises:
        ClusterError: Ray would be started in a folder whose name is too long for its sockets.
    """
    if starts:
        check_ray_folder()
        if os.environ.get(AUTH_MODE, "token").lower() == "token" and token_source() is None:
            _make_token()
    # Leave the mode unset: Ray reads the variable once, at import, which may have been long ago.
    token_logger().addFilter(_is_no_token_notice)


def _is_no_token_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled")


def _make_token() -> None:
    """Write a token where Ray looks for it; Ray itself would make it readable to all users of the machine."""
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it is empty
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        logger.warning("%s: cannot write a token (%s); leaving it to Ray", path, error.strerror)
        return
    with os.fdopen(number, "w") as file:
        file.write(secrets.token_hex(TOKEN_BYTES))


def token_source() -> str | None:
    """Return the source of this process's Ray token: a variable's name or a file; None without a token."""
    if os.environ.get(TOKEN):
        return TOKEN
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    return str(path) if path.is_file() and path.stat().st_size else None


def start_cluster(**options: Any) -> Any:
    """Start a Ray cluster on this machine, without a dashboard, and return Ray's context.

    Args:
        options: further options of ray.init.

    Raises:
        ClusterError: Ray does not start.
    """
    import ray

    prepare_ray(starts=True)
    try:
        return ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _system_config=SYSTEM_CONFIG,
            **options,
        )
    except Exception as error:  # a node that starts too slowly is an error without a class of its own
        reason = str(error).rstrip(".")
        raise ClusterError(
            f"Ray does not start on this machine: {reason}. Is it busy with other work, or short of memory or of space "
            "in Ray's folder (dora-ray doctor)? Try again, or join a cluster that runs: RAY_ADDRESS=host:port"
        ) from error


def join_cluster(address: str, **options: Any) -> Any:
    """Connect this process to a running cluster, and return Ray's context.

    Args:
        address: host:port of the head, "auto", or ray://host:port.
        options: options of ray.init.

    Raises:
        ClusterError: there is no cluster, or token or version do not match.
    """
    import ray
    from ray.exceptions import RayError

    prepare_ray(starts=False)
    # Without a listener, Ray would kill this very process after a minute.
    if not listens(address):
        raise ClusterError(
            f"no Ray cluster answers at {address}: nothing listens there. Is the head up (ray status), is this its "
            "address, and may this machine reach it?"
        )
    try:
        return ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise explain_refusal(address, error) from error


def listens(address: str) -> bool:
    """Return False if an address of the form host:port certainly has no listener."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def explain_refusal(address: str, error: BaseException) -> ClusterError:
    """Translate Ray's error on joining a cluster into advice.

    Args:
        address: address of the cluster.
        error: raised by ray.init or by Ray's job client.
    """
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return ClusterError(
            f"the cluster at {address} runs another version of Ray or Python than this machine: {text[:300]}. Install "
            "the same requirements.lock here and in the cluster's images"
        )
    # Ray's control plane gives no reason: it listens, but rejects this process.
    if "uthentication" in text or (isinstance(error, ConnectionError) and listens(address)):
        found = token_source()
        had = f"the token of {found} is not this cluster's" if found else "no token was found here"
        return ClusterError(
            f"the cluster at {address} refuses this machine: {had}. Copy the head's ~/.ray/auth_token to "
            f"~/.ray/auth_token here, or set {TOKEN_PATH} to it, with {AUTH_MODE}=token"
        )
    reason = text[:300].rstrip(".") or type(error).__name__
    tunnel = ". Is the tunnel to its dashboard open (ray dashboard, ssh -L)?" if address.startswith("http") else ""
    return ClusterError(f"no Ray cluster answers at {address}: {reason}{tunnel}")
