"""Checkpoints: what is damaged is never continued from, what is good is never lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

import dora_ray
from dora_ray.checkpoints import LATEST, META, MODEL, STATE, complete_checkpoints, set_newest
from dora_ray.clips.contents import StoredContents
from dora_ray.clips.plan import Plan
from dora_ray.config import Config
from dora_ray.errors import CheckpointError, ClusterError, ConfigError, DoRAError
from dora_ray.training.records import checkpoint
from dora_ray.training.records.checkpoint import CheckpointWriter, load_newest, take_snapshot, write_snapshot
from dora_ray.training.records.journal import Journal, read_events
from dora_ray.training.step import TrainState, initial_state
from dora_ray.training.worker import _restore, train_loop
from dora_ray.training.worlds import Job, LocalWorld
from tests.conftest import SMALL

CONFIG: Config = dora_ray.load_config("tiny", *SMALL)
PLAN = Plan((), 2, 1.0, True, 0, 4, 2, 40, (0.2, 1.0), (0.75, 1.33), {})


def local_world(job: Job) -> LocalWorld:
    """A world whose clips nobody reads."""
    return LocalWorld(job, StoredContents(job.plan, ()), lambda: True)


def state_at(step: int) -> TrainState:
    state = initial_state(CONFIG, torch.device("cpu"))
    state.step = step
    state.center += step
    return state


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Three complete checkpoints."""
    for step in (2, 4, 6):
        write_snapshot(take_snapshot(state_at(step), CONFIG, PLAN, 1), str(tmp_path))
    return tmp_path


def load(checkpoints: Path) -> tuple[str | None, list[str], TrainState]:
    state = initial_state(CONFIG, torch.device("cpu"))
    folder, refused = load_newest(str(checkpoints), state, CONFIG, PLAN)
    return (Path(folder).name if folder else None), refused, state


def test_newest_is_loaded(checkpoints: Path) -> None:
    name, refused, state = load(checkpoints)
    assert (name, refused, state.step) == ("step-00000006", [], 6)
    assert torch.equal(state.center, torch.full_like(state.center, 6.0))


@pytest.mark.parametrize("file", [MODEL, STATE])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_newest_is_refused_for_the_one_before(checkpoints: Path, file: str, damage: str) -> None:
    path = checkpoints / "step-00000006" / file
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.unlink() if damage == "missing" else path.write_bytes(content[:middle] if damage == "cut" else flipped)
    name, refused, state = load(checkpoints)
    assert (name, state.step) == ("step-00000004", 4)
    assert len(refused) == 1
    assert file in refused[0]
    set_newest(str(checkpoints), str(checkpoints / "step-00000004"))
    assert (checkpoints / LATEST).read_text() == "step-00000004\n"
    assert (checkpoints / "damaged-step-00000006").is_dir()
    assert load(checkpoints)[:2] == ("step-00000004", [])


def test_incomplete_newest_is_told_and_removed(checkpoints: Path) -> None:
    (checkpoints / "step-00000006" / META).unlink()
    name, (refused,), _ = load(checkpoints)
    assert name == "step-00000004"
    assert refused == f"{checkpoints / 'step-00000006'} is incomplete: its writer was interrupted."
    set_newest(str(checkpoints), str(checkpoints / "step-00000004"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002", "step-00000004"]


def test_all_damaged_is_an_error_and_not_a_new_beginning(checkpoints: Path) -> None:
    for folder in complete_checkpoints(str(checkpoints)):
        Path(folder, STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000006.*step-00000002.*No good checkpoint is left"):
        load(checkpoints)


def test_unknown_format_names_the_last_good_one(checkpoints: Path) -> None:
    path = checkpoints / "step-00000006" / META
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"has format 99; .*reads format \d.*the last complete .*step-00000004"):
        load(checkpoints)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load(tmp_path)[:2] == (None, [])
    (tmp_path / "step-00000002").mkdir()
    name, refused, state = load(tmp_path)
    assert (name, len(refused), state.step) == (None, 1, 0), "the first one was interrupted: a new beginning"


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from dora_ray.training.records.checkpoint import CheckpointWriter, take_snapshot
from dora_ray.training.records.journal import Journal
from tests.training.records.test_checkpoint import CONFIG, PLAN, state_at

run = Path(sys.argv[1])
journal = Journal(str(run), step=0, num_steps=9, world_size=1, entered=0.0)
writer = CheckpointWriter(str(run / "checkpoints"), keep=2, journal=journal)
writer.start(take_snapshot(state_at(2), CONFIG, PLAN, 1), reason="interval", copy_seconds=0.0)
writer.finish()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # what follows cannot be written whole
writer.start(take_snapshot(state_at(4), CONFIG, PLAN, 1), reason="interval", copy_seconds=0.0)
while writer.busy():
    pass
for step in range(5, 30):
    journal.metrics(step, {f"{'measure' * 30}_{number}": 0.0 for number in range(30)})
print("training goes on")
writer.finish()
"""


def test_disk_that_takes_no_more_leaves_the_last_good_one(tmp_path: Path) -> None:
    """The operating system itself refuses the write."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "training goes on" in done.stdout, done.stderr
    assert "CheckpointError" in done.stderr
    assert "could not be written" in done.stderr
    assert load(tmp_path / "checkpoints")[0] == "step-00000002"
    assert not list((tmp_path / "checkpoints").rglob("*.partial"))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "checkpoint", "warning", "warning"]
    assert "tensorboard gets nothing more" in events[-1]["message"]


def test_failed_checkpoints_push_no_good_one_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket refuses two of four; access comes back, and the two complete ones are kept."""
    run, write = tmp_path / "run", checkpoint.write_snapshot
    journal = Journal(str(run), step=0, num_steps=9, world_size=1, entered=0.0)
    writer = CheckpointWriter(str(run / "checkpoints"), keep=2, journal=journal)

    def refused(snapshot: Any, checkpoints: str) -> str:
        Path(checkpoints, snapshot.name).mkdir(parents=True)
        raise ConfigError("access was denied")

    for step, does in ((2, write), (4, refused), (6, refused), (8, write)):
        monkeypatch.setattr(checkpoint, "write_snapshot", does)
        writer.start(take_snapshot(state_at(step), CONFIG, PLAN, 1), reason="interval", copy_seconds=0.0)
        while writer.busy():
            time.sleep(0.01)
    writer.finish()
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000008"]
    warnings = [line["message"] for line in read_events(str(run)) if line["event"] == "warning"]
    assert len(warnings) == 2
    assert all("access was denied" in text and "are kept" in text for text in warnings)


class Ranks:
    """Two ranks that agree through each other."""

    device, all_reduce, size = torch.device("cpu"), None, 2

    def __init__(self, rank: int, said: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._said, self._barrier = rank, said, barrier

    def agree(self, choice: str | None) -> str | None:
        if self.rank == 0:
            self._said[0] = choice
        self._barrier.wait(10)
        said = self._said[0]
        self._barrier.wait(10)
        return said

    def share(self, problem: DoRAError | None) -> None:
        self._said[1 + self.rank] = problem
        self._barrier.wait(10)
        found = [one for one in self._said[1:] if one is not None]
        self._barrier.wait(10)
        if found:
            raise found[0]


def test_no_rank_waits_for_one_that_cannot_begin(tmp_path: Path) -> None:
    write_snapshot(take_snapshot(state_at(2), CONFIG, PLAN, 2), str(tmp_path / "checkpoints"))
    (tmp_path / "checkpoints" / "step-00000002" / STATE).write_bytes(b"")
    job, said, barrier = Job(CONFIG, PLAN, str(tmp_path)), [None] * 3, threading.Barrier(2)

    def begin(rank: int) -> str:
        with pytest.raises(CheckpointError) as caught:
            _restore(job, Ranks(rank, said, barrier), initial_state(CONFIG, torch.device("cpu")))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(begin, range(2))
    assert first == second
    assert "No good checkpoint is left" in first


def test_a_folder_that_nodes_do_not_share_is_named_on_all_ranks(tmp_path: Path) -> None:
    """Rank 1's node has another folder of the same name: rank 0 must not wait for it in the first step."""
    written, said, barrier = tmp_path / "0" / "run", [None] * 3, threading.Barrier(2)
    write_snapshot(take_snapshot(state_at(2), CONFIG, PLAN, 2), str(written / "checkpoints"))

    class OfItsNode(Ranks):
        def agree(self, choice: str | None) -> str | None:
            folder = super().agree(choice)
            return folder and folder.replace("/0/run", f"/{self.rank}/run")

    def begin(rank: int) -> str:
        job = Job(CONFIG, PLAN, str(tmp_path / str(rank) / "run"))
        with pytest.raises(ClusterError) as caught:
            _restore(job, OfItsNode(rank, said, barrier), initial_state(CONFIG, torch.device("cpu")))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(begin, range(2))
    assert first == second
    assert re.search(r"cannot read .*/1/run.*--out must be a folder that all nodes share", first)


def test_a_worker_that_does_not_see_the_runs_folder_says_so(tmp_path: Path) -> None:
    """Before anything is trained: else the run would end without a checkpoint, or begin anew after a failure."""
    with pytest.raises(ClusterError, match=r"cannot access .*nowhere: --out must be a folder that all nodes share"):
        train_loop(Job(CONFIG, PLAN, str(tmp_path / "nowhere")), local_world(Job(CONFIG, PLAN, str(tmp_path))))
    assert not (tmp_path / "nowhere").exists()


def test_a_checkpoint_names_the_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is measured where there is no Ray, its checkpoints with it."""

    def version(package: str) -> str:
        if package == "ray":
            raise PackageNotFoundError
        return "1.2"

    monkeypatch.setattr(checkpoint, "version", version)
    meta = take_snapshot(state_at(2), CONFIG, PLAN, 2).meta
    assert meta["versions"] == {"torch": "1.2", "timm": "1.2", "dora-ray": "1.2"}


def test_a_writer_killed_before_latest_is_made_up_for(checkpoints: Path) -> None:
    """meta.json is there, so the checkpoint counts: evaluation and export must not take the one before."""
    (checkpoints / LATEST).write_text("step-00000004\n")
    set_newest(str(checkpoints), str(checkpoints / "step-00000006"))
    assert (checkpoints / LATEST).read_text() == "step-00000006\n"


def test_memory_that_a_writer_lacks_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*arguments: object) -> str:
        raise MemoryError

    monkeypatch.setattr(checkpoint, "write_snapshot", write)
    journal = Journal(str(tmp_path), step=0, num_steps=9, world_size=1, entered=time.time())
    writer = CheckpointWriter(str(tmp_path / "checkpoints"), keep=1, journal=journal)
    for step in (1, 2):
        writer.start(take_snapshot(state_at(step), CONFIG, PLAN, 1), reason="interval", copy_seconds=0.0)
    with pytest.raises(CheckpointError, match="could not be written: MemoryError"):
        writer.finish()
