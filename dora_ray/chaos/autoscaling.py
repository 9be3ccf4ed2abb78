"""Training on Ray's own autoscaler, with the node types of a cluster file as fake nodes of this machine.

    python -m dora_ray.chaos.autoscaling --cluster cluster.yaml --json timeline.json --picture timeline.svg

Names, labels and limits are the file's; cores and memory are scaled down to fit one machine, and the cloud is Ray's
fake provider, whose nodes are local raylets. A film is ingested and trained on, starting from a cluster with only a
head. The timeline records nodes by type, the nodes on which decoding and training run, and the number of workers. One
train node is available at first, and a second once training has begun. A decode node is killed midway.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dora_ray.chaos.fake_nodes import FEW, HEAD_TYPE, MOST, end_session, fake_cluster, offer, processes_of, psutil
from dora_ray.cluster.starting import AUTH_MODE, join_cluster, prepare_ray
from dora_ray.config_source import parse_yaml
from dora_ray.errors import ClusterError
from dora_ray.video.synthetic import make_video

WORKER_CORES, FEWEST = 3, 1
START_SECONDS, TRAIN_SECONDS, EMPTY_SECONDS, LOOK_SECONDS = 600.0, 1500.0, 300.0, 1.0
KILLED = "is killed"
ENDING = (signal.SIGTERM, signal.SIGINT)
TRAINING = (
    *("model.width=48", "model.depth=2", "model.patch_size=8", "model.num_heads=6", "data.frames_per_second=6"),
    *("crops.clip_size=40", "crops.global_size=32", "crops.local_size=16", "data.short_side=48"),
    *("head.hidden_width=32", "head.bottleneck_width=16", "head.num_outputs=32", "data.segment_seconds=4"),
    *("optim.slots=4", "optim.clips_per_slot=2", "optim.warmup_steps=2", "optim.freeze_last_layer_steps=1"),
    *("run.log_every_steps=5", "run.checkpoint_seconds=5", "cluster.decode_label=decode", "cluster.use_gpu=false"),
    *(f"cluster.cpus_per_worker={WORKER_CORES}", f"cluster.num_workers=[{FEWEST}, 2]", "cluster.resize_seconds=5"),
)


@dataclass(frozen=True)
class Moment:
    """State of the cluster at one time.

    Attributes:
        seconds: since training was started.
        nodes: ids of living nodes by type.
        processes: decoding and training processes, by node type.
    """

    seconds: float
    nodes: dict[str, list[str]]
    processes: dict[str, list[str]]

    def count(self, kind: str) -> int:
        """Return the number of nodes of a type."""
        return len(self.nodes.get(kind, []))


@dataclass
class Timeline:
    """Changes of the cluster over time, and the actions taken.

    Attributes:
        moments: changes in order.
        events: (seconds, description).
        workers: (seconds, number of workers) of each start of training.
        status: exit status of the training; None if it did not end.
    """

    moments: list[Moment] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    workers: list[tuple[float, int]] = field(default_factory=list)
    status: int | None = None

    def most(self, kind: str) -> int:
        """Return the largest number of simultaneous nodes of a type."""
        return max((moment.count(kind) for moment in self.moments), default=0)

    def grew(self) -> bool:
        """Return whether the training began on the fewest workers and continued on more."""
        counts = [count for _, count in self.workers]
        return bool(counts) and counts[0] == FEWEST and max(counts) > FEWEST

    def replaced(self) -> bool:
        """Return whether a decode node came after one was killed."""
        killed = next((seconds for seconds, words in self.events if KILLED in words), math.inf)
        before = {
            name for moment in self.moments if moment.seconds <= killed for name in moment.nodes.get("decode", [])
        }
        return any(set(moment.nodes.get("decode", [])) - before for moment in self.moments)

    def misplaced(self) -> list[str]:
        """Return processes on the wrong nodes: any on the head, decoding on train nodes, or the reverse."""
        wrong = []
        for moment in self.moments:
            for kind, names in moment.processes.items():
                wrong += [
                    f"{name} on a {kind} node after {moment.seconds:.0f} s"
                    for name in names
                    if kind == "head" or ("TrainWorker" in name) != (kind == "train")
                ]
        return sorted(set(wrong))


def _look(address: str, started: float) -> Moment:
    """Return the nodes that Ray counts as alive, and the processes on each type."""
    import ray

    nodes: dict[str, list[str]] = {}
    for node in ray.nodes():
        if node["Alive"]:
            nodes.setdefault(node["Labels"].get("role", "head"), []).append(node["NodeID"][-5:])
    processes: dict[str, set[str]] = {}
    for process, kind in processes_of(address):
        title = (process.info["cmdline"] or [""])[0]
        name = title.removeprefix("ray::").partition(".")[0].partition(" ")[0]
        if title.startswith("ray::") and any(word in name for word in ("Map(", "MapBatches(", "RayTrainWorker")):
            processes.setdefault("head" if kind == HEAD_TYPE else kind, set()).add(name)
    return Moment(
        round(time.monotonic() - started, 1),
        {kind: sorted(ids) for kind, ids in nodes.items()},
        {kind: sorted(names) for kind, names in processes.items()},
    )


def run(cluster: Mapping[str, Any], folder: Path, *, steps: int) -> Timeline:
    """Ingest a film and train on it, starting and ending without worker nodes; return the timeline.

    Once two decode nodes are there, one is killed.

    Args:
        cluster: content of cluster.yaml.
        folder: folder for the film, the store and the run.
        steps: number of training steps.

    Raises:
        ClusterError: the head does not start.
    """
    film = folder / "film.mp4"
    make_video(film, width=320, height=180, num_frames=60 * 24, frames_per_second=24.0, seed=0, group_size=48)
    timeline, killed = Timeline(), False
    with _ended_in_order(), fake_cluster(cluster, folder) as address:
        _join(address, folder)
        started = time.monotonic()
        command = [sys.executable, "-m", "dora_ray", "train", "tiny", *TRAINING, f"data.videos=[{film}]"]
        command += [f"data.store={folder / 'store'}", f"optim.steps={steps}", "--out", str(folder / "run")]
        with (folder / "train.log").open("wb") as log:
            environment = os.environ | {"RAY_ADDRESS": address}
            training = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            for moment in _moments(timeline, address, started, training):
                events = _events(folder / "run")
                _note_workers(timeline, events, started)
                if timeline.workers:
                    offer(cluster, folder, address, MOST)
                elif any(event["event"] == "launch" for event in events):
                    offer(cluster, folder, address, FEW, {"train": FEWEST})
                if not killed and moment.count("decode") >= 2 and (number := _kill_decode_node(address)):
                    killed = True
                    timeline.events.append((moment.seconds, f"decode node {number} {KILLED}"))
        finally:
            end_session(training)
            _leave()
    return timeline


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Make SIGTERM and Ctrl-C exit the open blocks, which end the cluster; further signals are then ignored."""
    before = {number: signal.getsignal(number) for number in ENDING}
    _catch()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _catch() -> None:
    for number in ENDING:
        signal.signal(number, _exit)


def _exit(number: int, _: FrameType | None) -> None:
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _join(address: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while (problem := _try_to_join(address)) is not None:
        if time.monotonic() > deadline:
            raise ClusterError(f"{problem}; the head said: {(folder / 'head.log').read_text()[-2000:]}") from problem
        time.sleep(1)


def _try_to_join(address: str) -> ClusterError | None:
    """Return the error, or None if joined. Undo Ray's SIGTERM handler, which would end this process at once."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        join_cluster(address, log_to_driver=False, logging_level="error")
    except ClusterError as error:
        return error
    finally:
        _catch()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    return None


def _leave() -> None:
    import ray

    ray.shutdown()


def _moments(timeline: Timeline, address: str, started: float, training: subprocess.Popen[bytes]) -> Iterator[Moment]:
    """Record every change, and yield each observation, until training has ended and its nodes are gone."""
    ended: float | None = None
    while True:
        moment = _look(address, started)
        last = timeline.moments[-1] if timeline.moments else None
        if last is None or (moment.nodes, moment.processes) != (last.nodes, last.processes):
            timeline.moments.append(moment)
        yield moment
        if ended is None and training.poll() is not None:
            ended, timeline.status = moment.seconds, training.returncode
            timeline.events.append((ended, f"the training ends with status {training.returncode}"))
        over = ended is not None and set(moment.nodes) == {"head"}
        late = moment.seconds > (TRAIN_SECONDS if ended is None else ended + EMPTY_SECONDS)
        if over or late:
            return
        time.sleep(LOOK_SECONDS)


def _events(run: Path) -> list[dict[str, Any]]:
    with suppress(FileNotFoundError, ValueError):  # not there yet, or half a line
        return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return []


def _note_workers(timeline: Timeline, events: Sequence[dict[str, Any]], started: float) -> None:
    """Record restarts of the training since the last look, with their number of workers."""
    for event in [event for event in events if event["event"] == "start"][len(timeline.workers) :]:
        seconds = round(event["time"] - (time.time() - time.monotonic()) - started, 1)
        count = int(event["world_size"])
        timeline.workers.append((seconds, count))
        timeline.events.append((seconds, f"training on {count} worker{'s' * (count > 1)}"))


def _kill_decode_node(address: str) -> str:
    """Kill one raylet and its children with SIGKILL, as a lost machine would; return the end of its id."""
    for process, kind in processes_of(address):
        with suppress(psutil().Error):
            if kind == "decode" and process.name() == "raylet":
                number = str(process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING", ""))[-5:]
                for one in [*process.children(recursive=True), process]:
                    one.kill()
                return number
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment, and print the table."""
    from dora_ray.chaos.timeline_picture import picture, table

    parser = argparse.ArgumentParser(prog="python -m dora_ray.chaos.autoscaling", description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="cluster.yaml", metavar="FILE", help="whose node types (cluster.yaml)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of the training (300)")
    parser.add_argument("--json", metavar="FILE", help="write the timeline there")
    parser.add_argument("--picture", metavar="FILE", help="write it there as an SVG")
    options = parser.parse_args(arguments)
    # Ray reads the mode at import, so it must be set here for the head, this process and the training.
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
    if not timeline.grew():
        sys.stdout.write(f"training should start on {FEWEST} worker and grow, but ran on: {timeline.workers}\n")
    if not timeline.replaced():
        sys.stdout.write("no decode node was killed and replaced\n")
    good = timeline.status == 0 and not wrong and timeline.replaced() and timeline.grew()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
