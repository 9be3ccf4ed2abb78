"""Spot watcher: drain this Ray node as soon as the cloud announces that it will be terminated.

    python -m dora_ray.spot --provider aws

runs on every spot node beside Ray (cluster.yaml starts it). It polls the provider every few seconds for a termination
notice. When there is one, it asks Ray to drain the node with the notice's deadline, and exits. Ray then places nothing
new on the node, and training writes a checkpoint before the node is gone. Ray itself does not read these notices.

Notices by provider:
    aws    169.254.169.254/latest/meta-data/spot/instance-action (IMDSv2): 404, or JSON with the time; 120 s ahead
    gcp    metadata.google.internal/computeMetadata/v1/instance/preempted: FALSE or TRUE; 30 s ahead
    file   a file that appears; it may hold the remaining seconds
    url    404, then 200; the body may be the remaining seconds
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

from dora_ray.cluster.starting import listens
from dora_ray.errors import ClusterError, DoRAError
from dora_ray.ray_internals import drain_node, living_nodes_at

logger = logging.getLogger(__name__)

AWS_URL, GCP_URL = "http://169.254.169.254", "http://metadata.google.internal"
AWS_TOKEN_SECONDS = 21600
GCP_NOTICE_SECONDS = 30.0
# Notice period of a file or URL without a time: the shorter one of the two clouds.
OTHER_NOTICE_SECONDS = 30.0
REQUEST_SECONDS = 2.0
RETRY_SECONDS = 1.0
NODE_ID = re.compile("[0-9a-f]{56}")


@dataclass(frozen=True)
class Notice:
    """Notice that the cloud terminates this node at `deadline`, as time.time()."""

    deadline: float


Look = Callable[[], Notice | None]


def aws(url: str) -> Look:
    """Return a check for EC2's notice, through IMDSv2; the session token is renewed when it is refused.

    Args:
        url: URL of the metadata service.
    """
    token = ""

    def ask() -> str | None:
        return _request(f"{url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})

    def look() -> Notice | None:
        nonlocal token
        try:
            answer = ask()
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.UNAUTHORIZED:
                raise
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_SECONDS)}
            token = _request(f"{url}/latest/api/token", lifetime, method="PUT") or ""
            answer = ask()
        if answer is None:
            return None
        when = datetime.strptime(json.loads(answer)["time"], "%Y-%m-%dT%H:%M:%SZ")
        return Notice(when.replace(tzinfo=UTC).timestamp())

    return look


def gcp(url: str) -> Look:
    """Return a check for Compute Engine's notice.

    Args:
        url: URL of the metadata service.
    """

    def look() -> Notice | None:
        answer = _request(f"{url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        taken = answer is not None and answer.strip() == "TRUE"
        return Notice(time.time() + GCP_NOTICE_SECONDS) if taken else None

    return look


def from_url(url: str) -> Look:
    """Return a check for a notice at a custom URL."""
    return lambda: _announced(_request(url, {}))


def from_file(path: str) -> Look:
    """Return a check for a notice in a file."""

    def look() -> Notice | None:
        try:
            return _announced(Path(path).read_text())
        except FileNotFoundError:
            return None

    return look


def _announced(text: str | None) -> Notice | None:
    if text is None:
        return None
    seconds = float(text) if text.strip() else OTHER_NOTICE_SECONDS
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} seconds are left")
    return Notice(time.time() + seconds)


def _request(url: str, headers: Mapping[str, str], *, method: str = "GET") -> str | None:
    """Return the body, or None for 404. Bypass proxies, which must not answer for this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with opener.open(request, timeout=REQUEST_SECONDS) as answer:
            return str(answer.read().decode("utf-8"))
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.NOT_FOUND:
            return None
        raise


def wait_for_notice(look: Look, *, poll_seconds: float) -> Notice:
    """Poll until there is a notice, and return it. A missing or malformed answer counts as no notice."""
    complained = False
    while True:
        try:
            notice = look()
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            notice = None
            if not complained:
                logger.warning("no readable answer, polling again: %s", error)
            complained = True
        else:
            complained = False
        if notice is not None:
            return notice
        time.sleep(poll_seconds)


def drain(address: str, node_id: str, *, seconds: float, reason: str) -> None:
    """Ask Ray to drain a node that goes away in `seconds`; return when Ray has accepted.

    Args:
        address: host:port of the cluster's control plane.
        node_id: the node's id, in hexadecimal.
        seconds: time until the node goes away.
        reason: reason for Ray's own messages.

    Raises:
        ClusterError: Ray does not answer, or refuses.
    """
    if NODE_ID.fullmatch(node_id) is None:  # Ray would accept it, and drain nothing
        raise ClusterError(f"{node_id!r} is not a Ray node id, which has 56 hexadecimal digits")
    if not listens(address):  # Ray's client would look for 40 seconds, a third of a notice
        raise ClusterError(f"Ray at {address} does not answer: nothing listens there")
    try:
        refusal = drain_node(address, node_id, deadline=time.time() + max(0.0, seconds), reason=reason)
    except Exception as error:  # its errors have no common class below Exception
        raise ClusterError(f"Ray at {address} does not answer: {error}") from error
    if refusal is not None:
        raise ClusterError(f"Ray at {address} refuses to drain node {node_id}: {refusal}")


def find_node(address: str) -> str:
    """Return the id of the live node at this machine's address.

    Raises:
        ClusterError: there is no such node or more than one, or Ray does not answer.
    """
    import ray

    here = ray.util.get_node_ip_address()
    try:
        found = living_nodes_at(address, here)
    except Exception as error:  # as above
        raise ClusterError(f"Ray at {address} does not answer: {error}") from error
    if len(found) != 1:
        raise ClusterError(
            f"{len(found)} live nodes of Ray at {address} have this machine's address {here}: give --node-id"
        )
    return found[0]


def drain_until_accepted(address: str, node_id: str | None, notice: Notice) -> None:
    """Drain this node, with retries until the notice's deadline.

    Raises:
        ClusterError: the last failure.
    """
    while True:
        seconds = notice.deadline - time.time()
        try:
            drain(address, node_id or find_node(address), seconds=seconds, reason="spot termination notice")
        except ClusterError as error:
            if seconds < RETRY_SECONDS:
                raise
            logger.warning("%s; trying again", error)
            time.sleep(RETRY_SECONDS)
        else:
            logger.warning("drained: this node will be terminated in %.0f s", seconds)
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """Wait for a notice, drain the node, and return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    looks = {"aws": aws, "gcp": gcp, "url": from_url, "file": from_file}
    source = options.source or {"aws": AWS_URL, "gcp": GCP_URL}.get(options.provider)
    if source is None:
        _parser().error(f"--provider {options.provider} needs --source")
    try:
        notice = wait_for_notice(looks[options.provider](source), poll_seconds=options.poll_seconds)
        drain_until_accepted(options.address, options.node_id, notice)
    except DoRAError as error:
        logger.error("%s", error)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dora_ray.spot",
        description="Drain this Ray node when the cloud announces its termination.",
    )
    parser.add_argument("--provider", choices=("aws", "gcp", "url", "file"), required=True, help="source of the notice")
    parser.add_argument("--source", metavar="URL | FILE", help="location of the notice (has a default for aws and gcp)")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        default=os.environ.get("RAY_ADDRESS"),
        required="RAY_ADDRESS" not in os.environ,
        help="the cluster's head (default: RAY_ADDRESS)",
    )
    parser.add_argument("--node-id", metavar="HEX", help="this node's id (default: found by this machine's address)")
    parser.add_argument("--poll-seconds", type=float, default=2.0, metavar="N", help="polling interval in seconds (2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
