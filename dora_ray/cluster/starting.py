"""Preparation of every Ray that is started or joined: its folder, its token, and why a cluster refuses."""

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
# Settings of a Ray that is started here for a training.
SYSTEM_CONFIG = {
    # Ray ends an idle process after a second once there are more processes than cores, actors counted: on a laptop that
    # is every decode process between two tasks, and each new one imports for seconds.
    "num_workers_soft_limit": 64,
    # Tasks that the head remembers for the dashboard, each in 7 KB: Ray's own 100,000 are 700 MB.
    "task_events_max_num_task_in_gcs": 10_000,
}


def prepare_ray(*, starts: bool) -> None:
    """Check the folder of Ray's sockets, and leave out what Ray says about its token at every start.

    A Ray that is started has token mode without being asked; where there is no token yet, one is made that this user
    alone may read. One that is joined gets the token that is found here. RAY_AUTH_MODE=disabled turns both off, and
    `dora-ray doctor` says so.

    Args:
        starts: a Ray is started here; otherwise one is joined.

    Raises:
        ClusterError: a Ray is started below a folder whose name is too long for its sockets.
    """
    if starts:
        check_ray_folder()
        if os.environ.get(AUTH_MODE, "token").lower() == "token" and token_source() is None:
            _make_token()
    # The mode itself is left alone: Ray reads the variable once, when it is imported, and that may have been long ago.
    token_logger().addFilter(_is_no_token_notice)


def _is_no_token_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled")


def _make_token() -> None:
    """Write a token where Ray looks for it; Ray itself would leave it readable to all users of the machine."""
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it is empty
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        logger.warning("%s: no token could be written (%s); Ray tries by itself", path, error.strerror)
        return
    with os.fdopen(number, "w") as file:
        file.write(secrets.token_hex(TOKEN_BYTES))


def token_source() -> str | None:
    """Where this process finds Ray's token: a variable's name or a file; None without a token."""
    if os.environ.get(TOKEN):
        return TOKEN
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    return str(path) if path.is_file() and path.stat().st_size else None


def join_cluster(address: str, **options: Any) -> Any:
    """Connect this process to a cluster that runs already, and return Ray's context.

    Args:
        address: host:port of its head, "auto", or ray://host:port.
        options: of ray.init.

    Raises:
        ClusterError: nobody answers, the token or a version is another, or no such thing is there.
    """
    import ray
    from ray.exceptions import RayError

    prepare_ray(starts=False)
    # Where nobody listens, Ray would end this very process after a minute.
    if not _listens(address):
        raise ClusterError(
            f"no Ray cluster answers at {address}: nothing listens there. Is the head up (ray status), is this its "
            "address, and may this machine reach it?"
        )
    try:
        return ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise explain_refusal(address, error) from error


def _listens(address: str) -> bool:
    """Return False where an address of the form host:port surely has no listener."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return True
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def explain_refusal(address: str, error: BaseException) -> ClusterError:
    """Turn what Ray says when it cannot be joined into what to do.

    Args:
        address: of the cluster.
        error: raised by ray.init or by Ray's job client.
    """
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return ClusterError(
            f"the cluster at {address} runs another version of Ray or Python than this machine: {text[:300]}. Install "
            "the same requirements.lock here and in the cluster's images"
        )
    # Ray's control plane gives no reason: it listens, and does not let this process in.
    if "uthentication" in text or (isinstance(error, ConnectionError) and _listens(address)):
        found = token_source()
        had = f"the token of {found} is not this cluster's" if found else "no token was found here"
        return ClusterError(
            f"the cluster at {address} refuses this machine: {had}. Copy the head's ~/.ray/auth_token to "
            f"~/.ray/auth_token here, or name it by {TOKEN_PATH}, with {AUTH_MODE}=token"
        )
    return ClusterError(f"no Ray cluster answers at {address}: {text[:300] or type(error).__name__}")
