"""A training on Ray's own autoscaler, with the node types of a cluster's file as fake nodes of this machine.

    python -m dora_ray.chaos.autoscaling --cluster cluster.yaml --json timeline.json --picture timeline.svg

Names, labels and limits are the file's; cores and memory are scaled down to what one machine can pretend to have, and
the cloud is Ray's fake provider, whose nodes are raylets here. A film is ingested and trained on from a cluster that
has a head and nothing else. What is watched: nodes by type, and on which of them decoding and training run. In the
middle of it a decode node is killed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dora_ray.cluster.starting import AUTH_MODE, join_cluster, prepare_ray
from dora_ray.config_source import parse_yaml
from dora_ray.errors import ClusterError
from dora_ray.ray_internals import FAKE_PROVIDER
from dora_ray.video.synthetic import make_video

# The fake provider knows the head by this name, and its nodes by such ids.
HEAD_TYPE, HEAD_ID = "ray.head.default", "f" * 51 + "00000"
# Cores of a pretended node, and how many of them at most: a training worker fits on a train node alone, as one with a
# GPU does, and several decode nodes are wanted for a film of some segments.
CORES = {"decode": 2, "train": 4}
MOST = {"decode": 3, "train": 2}
WORKER_CORES = 3
STORE_BYTES = 200_000_000
IDLE_MINUTES = 0.25
START_SECONDS, TRAIN_SECONDS, EMPTY_SECONDS, LOOK_SECONDS = 120.0, 600.0, 180.0, 1.0
TRAINING = (
    *("model.width=48", "model.depth=2", "model.patch_size=8", "model.num_heads=6", "data.frames_per_second=6"),
    *("crops.clip_size=40", "crops.global_size=32", "crops.local_size=16", "data.short_side=48"),
    *("head.hidden_width=32", "head.bottleneck_width=16", "head.num_outputs=32", "data.segment_seconds=4"),
    *("optim.slots=4", "optim.clips_per_slot=2", "optim.warmup_steps=2", "optim.freeze_last_layer_steps=1"),
    *("run.log_every_steps=5", "run.checkpoint_seconds=5", "cluster.decode_label=decode", "cluster.use_gpu=false"),
    *(f"cluster.cpus_per_worker={WORKER_CORES}", "cluster.num_workers=[1, 2]", "cluster.resize_seconds=5"),
)


@dataclass(frozen=True)
class Moment:
    """The cluster at one time.

    Attributes:
        seconds: since the training was started.
        nodes: ids of living nodes by type.
        processes: what decodes or trains, by type of node.
    """

    seconds: float
    nodes: dict[str, list[str]]
    processes: dict[str, list[str]]

    def count(self, kind: str) -> int:
        """Nodes of a type."""
        return len(self.nodes.get(kind, []))


@dataclass
class Timeline:
    """All moments at which something had changed, and what was done.

    Attributes:
        moments: in order.
        events: seconds and words.
        status: exit status of the training; None if it did not end.
    """

    moments: list[Moment] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    status: int | None = None

    def most(self, kind: str) -> int:
        """The most nodes of a type at a time."""
        return max((moment.count(kind) for moment in self.moments), default=0)

    def misplaced(self) -> list[str]:
        """Processes on nodes that are not for them: anything on the head, decoding on train nodes, or the reverse."""
        wrong = []
        for moment in self.moments:
            for kind, names in moment.processes.items():
                wrong += [
                    f"{name} on a {kind} node after {moment.seconds:.0f} s"
                    for name in names
                    if kind == "head" or ("TrainWorker" in name) != (kind == "train")
                ]
        return sorted(set(wrong))


def scaled_down(cluster: Mapping[str, Any], gcs_address: str) -> dict[str, Any]:
    """Return a cluster's file with its node types as fake nodes of this machine.

    Args:
        cluster: the content of cluster.yaml.
        gcs_address: host:port at which the head will listen.
    """
    types = cluster["available_node_types"]
    head = cluster["head_node_type"]
    nodes = {HEAD_TYPE: {"resources": {"CPU": 0}, "labels": types[head]["labels"], "node_config": {}, "max_workers": 0}}
    for name, node in types.items():
        if name != head:
            nodes[name] = {
                "resources": {"CPU": CORES[name], "object_store_memory": STORE_BYTES},
                "labels": node["labels"],
                "node_config": {},
                "min_workers": node["min_workers"],
                "max_workers": min(MOST[name], node["max_workers"]),
            }
    commands = ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    return {
        "cluster_name": cluster["cluster_name"],
        "max_workers": cluster["max_workers"],
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": FAKE_PROVIDER,
            "foreground_node_launch": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
        },
        "docker": {},
        "auth": {},
        "head_node_type": HEAD_TYPE,
        "available_node_types": nodes,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in (*lists, *commands)},
    }


@contextmanager
def fake_cluster(cluster: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """A head with the autoscaler, and no other node; yields its address. All its processes end with the context."""
    import ray

    with socket.create_server(("", 0)) as free, socket.create_server(("", 0)) as other:
        port, client_port = free.getsockname()[1], other.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    file = folder / "autoscaling.yaml"
    file.write_text(yaml.safe_dump(scaled_down(cluster, address)))
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        # As `ray up` sets it: without it the first job of a cluster without workers is refused.
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_worker_niceness": "0",
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "4",
    }
    ray_command = Path(sys.executable).with_name("ray")
    command = [str(ray_command), "start", "--head", f"--port={port}", "--num-cpus=0", "--block"]
    command += ["--include-dashboard=false", f"--object-store-memory={STORE_BYTES}", f"--autoscaling-config={file}"]
    command += ["--disable-usage-stats", "--labels=role=head", f"--ray-client-server-port={client_port}"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(timeout=20)
        _end_rest(address)


def _end_rest(address: str) -> None:
    """End what the fake provider's nodes have left behind, which are in groups of their own."""
    for process, _ in _of_cluster(address):
        with suppress(_psutil().Error):
            process.kill()


def _psutil() -> Any:
    return importlib.import_module("psutil")  # Ray brings it along


def _of_cluster(address: str) -> list[tuple[Any, str]]:
    """Processes of the cluster with the type of their node, the raylets first."""
    port = address.rpartition(":")[2]
    found = []
    for raylet in _psutil().process_iter(["name", "cmdline"]):
        with suppress(_psutil().Error):
            if raylet.info["name"] == "raylet" and any(port in word for word in raylet.info["cmdline"] or ()):
                kind = raylet.environ().get("RAY_NODE_TYPE_NAME", HEAD_TYPE)
                found += [(raylet, kind), *((child, kind) for child in raylet.children(recursive=True))]
    return found


def _look(address: str, started: float) -> Moment:
    """The nodes that Ray takes to be alive, and what runs on each type of them."""
    import ray

    nodes: dict[str, list[str]] = {}
    for node in ray.nodes():
        if node["Alive"]:
            nodes.setdefault(node["Labels"].get("role", "head"), []).append(node["NodeID"][-5:])
    processes: dict[str, set[str]] = {}
    for process, kind in _of_cluster(address):
        with suppress(_psutil().Error):
            title = process.cmdline()[0] if process.cmdline() else ""
            name = title.removeprefix("ray::").partition(".")[0].partition(" ")[0]
            if title.startswith("ray::") and any(word in name for word in ("Map(", "MapBatches(", "RayTrainWorker")):
                processes.setdefault("head" if kind == HEAD_TYPE else kind, set()).add(name)
    return Moment(
        round(time.monotonic() - started, 1),
        {kind: sorted(ids) for kind, ids in nodes.items()},
        {kind: sorted(names) for kind, names in processes.items()},
    )


def run(cluster: Mapping[str, Any], folder: Path, *, steps: int, kill: bool = True) -> Timeline:
    """Ingest a film and train on it, from no worker node to no worker node, and return what was seen.

    Args:
        cluster: the content of cluster.yaml.
        folder: for the film, the store and the run.
        steps: of the training.
        kill: a decode node, once two are there.

    Raises:
        ClusterError: the head does not start.
    """
    film = folder / "film.mp4"
    make_video(film, width=320, height=180, num_frames=60 * 24, frames_per_second=24.0, seed=0, group_size=48)
    timeline = Timeline()
    with fake_cluster(cluster, folder) as address:
        _join(address, folder)
        started = time.monotonic()
        command = [sys.executable, "-m", "dora_ray", "train", "tiny", *TRAINING, f"data.videos=[{film}]"]
        command += [f"data.store={folder / 'store'}", f"optim.steps={steps}", "--out", str(folder / "run")]
        with (folder / "train.log").open("wb") as log:
            training = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stdout=log, stderr=log)
        try:
            _watch(timeline, address, started, training, kill=kill)
        finally:
            training.kill()
            _leave()
    return timeline


def _join(address: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            join_cluster(address, log_to_driver=False, logging_level="error")
        except ClusterError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"{error}; the head said: {(folder / 'head.log').read_text()[-2000:]}") from error
            time.sleep(1)
        else:
            return


def _leave() -> None:
    import ray

    ray.shutdown()


def _watch(timeline: Timeline, address: str, started: float, training: subprocess.Popen[bytes], *, kill: bool) -> None:
    """Note every change until the training has ended and its nodes are gone."""
    ended: float | None = None
    while True:
        moment = _look(address, started)
        last = timeline.moments[-1] if timeline.moments else None
        if last is None or (moment.nodes, moment.processes) != (last.nodes, last.processes):
            timeline.moments.append(moment)
        if kill and moment.count("decode") >= 2 and "decode" in moment.processes:
            kill = False
            timeline.events.append((moment.seconds, f"decode node {_kill_decode_node(address)} is killed"))
        if ended is None and training.poll() is not None:
            ended, timeline.status = moment.seconds, training.returncode
            timeline.events.append((ended, f"the training ends with status {training.returncode}"))
        over = ended is not None and set(moment.nodes) == {"head"}
        late = moment.seconds > (TRAIN_SECONDS if ended is None else ended + EMPTY_SECONDS)
        if over or late:
            return
        time.sleep(LOOK_SECONDS)


def _kill_decode_node(address: str) -> str:
    """SIGKILL to one raylet and all that runs under it, as when a machine is gone; the end of its id."""
    for process, kind in _of_cluster(address):
        with suppress(_psutil().Error):
            if kind == "decode" and process.name() == "raylet":
                number = str(process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING", ""))[-5:]
                for one in [*process.children(recursive=True), process]:
                    one.kill()
                return number
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, and print the table."""
    from dora_ray.chaos.timeline_picture import picture, table

    parser = argparse.ArgumentParser(prog="python -m dora_ray.chaos.autoscaling", description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="cluster.yaml", metavar="FILE", help="whose node types (cluster.yaml)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of the training (300)")
    parser.add_argument("--json", metavar="FILE", help="write the timeline there")
    parser.add_argument("--picture", metavar="FILE", help="write it there as an SVG")
    options = parser.parse_args(arguments)
    # Ray reads it when it is imported: the head, this process and the training are to have one mode.
    os.environ.setdefault(AUTH_MODE, "token")
    prepare_ray(starts=True)
    cluster = parse_yaml(Path(options.cluster).read_text(encoding="utf-8"), options.cluster)
    with tempfile.TemporaryDirectory(prefix="dora-autoscaling-") as folder:
        timeline = run(cluster, Path(folder), steps=options.steps)
        if timeline.status:
            sys.stderr.write((Path(folder) / "train.log").read_text()[-4000:])
    sys.stdout.write(table(timeline) + "\n")
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(timeline), indent=1) + "\n")
    if options.picture:
        Path(options.picture).write_text(picture(timeline))
    wrong = timeline.misplaced()
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    return int(timeline.status != 0 or bool(wrong) or timeline.most("decode") < 2)


if __name__ == "__main__":
    sys.exit(main())
