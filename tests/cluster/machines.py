"""Machines simulated by namespaces: each has its own network, processes, Ray folder, home, and sshd.

Needs root, iproute2, util-linux, openssh-server and rsync. Everything ends with the context: processes by their
namespace, interfaces by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.heads import background

SSHD = "/usr/sbin/sshd"
TOOLS = ("ip", "unshare", "ssh", "ssh-keygen", "rsync", SSHD)
SSH_SECONDS = 30


def missing() -> str | None:
    """Return why such machines cannot be created here; None if they can."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: openssh-server, rsync, iproute2)"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], check=False).returncode:
        return "needs root, with the right to make namespaces"
    return None


@dataclass(frozen=True)
class Machines:
    """Addresses, and the key for ssh."""

    addresses: tuple[str, ...]
    key: Path

    def ssh(self, address: str, *words: str) -> list[str]:
        """Return the command line that runs a command there."""
        options = ["-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        return ["ssh", *options, "-o", "LogLevel=ERROR", f"root@{address}", *words]


@contextmanager
def machines(folder: Path, count: int) -> Iterator[Machines]:
    """Start machines on one bridge for the duration of the context."""
    number = os.getpid() % 200 + 20
    bridge, prefix = f"dora{number}", f"10.77.{number}"
    key, host_key = folder / "key", folder / "host_key"
    for path in (key, host_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    Path("/tmp/ray").mkdir(exist_ok=True)
    addresses = tuple(f"{prefix}.{last}" for last in range(2, 2 + count))
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{prefix}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for address in addresses:
            stack.enter_context(_machine(folder, bridge, address, host_key, key))
        found = Machines(addresses, key)
        for address in addresses:
            _wait(found.ssh(address, "true"))
        yield found


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def _machine(folder: Path, bridge: str, address: str, host_key: Path, key: Path) -> Iterator[None]:
    last = address.rpartition(".")[2]
    space, here = f"{bridge}-{last}", f"v{bridge}-{last}"
    config = folder / f"sshd-{last}"
    config.write_text(
        f"Port 22\nListenAddress {address}\nHostKey {host_key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\n"
        "UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\nMaxStartups 50\n"
    )
    with ExitStack() as stack:
        _ip("netns", "add", space)
        stack.callback(_ip, "netns", "del", space)
        _ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", here, "master", bridge, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        # No outside network is reachable, but Ray takes the source address of a default route as its own.
        _ip("-n", space, "route", "add", "default", "via", f"{address.rpartition('.')[0]}.1")
        own = folder / f"own-{last}"
        own.mkdir()
        # Home and Ray's folder are private to the machine. The rest of the disk is shared, as over NFS.
        # The shell stays as process 1, because it reaps orphans; sshd would not, and processes stopped by `ray stop`
        # would remain as zombies.
        boot = (
            f"mount -t tmpfs none {own} && mkdir {own}/home {own}/work && mount -t overlay overlay -o "
            f"lowerdir={Path.home()},upperdir={own}/home,workdir={own}/work {Path.home()} && "
            f"mount -t tmpfs none /tmp/ray && {SSHD} -D -e -f {config}; true"
        )
        command = [
            "ip",
            "netns",
            "exec",
            space,
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
        ]
        with background([*command, "sh", "-c", boot], dict(os.environ), folder / f"sshd-{last}.log"):
            yield


def _wait(command: list[str]) -> None:
    deadline = time.monotonic() + SSH_SECONDS
    while subprocess.run(command, check=False, capture_output=True).returncode:
        assert time.monotonic() < deadline, f"{' '.join(command)} does not answer"
        time.sleep(0.5)
