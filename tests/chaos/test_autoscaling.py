"""Autoscaler with the node types of cluster.yaml: the converted file, the report, and a real run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from dora_ray.chaos.autoscaling import Moment, Timeline, run
from dora_ray.chaos.fake_nodes import FEW, HEAD_TYPE, MOST, end_session, psutil, scaled_down
from dora_ray.chaos.timeline_picture import picture, table

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())

MADE_UP = Timeline(
    [
        Moment(0.0, {"head": ["0"]}, {}),
        Moment(20.0, {"head": ["0"], "decode": ["1", "2"]}, {"decode": ["Map(ingest)"]}),
        Moment(25.0, {"head": ["0"], "decode": ["1"], "train": ["3"]}, {"train": ["RayTrainWorker"]}),
        Moment(90.0, {"head": ["0"]}, {}),
    ],
    [(21.0, "decode node 00002 is killed"), (60.0, "the training ends with status 0")],
    [(22.0, 1), (40.0, 2)],
    0,
)


def test_names_labels_and_limits_are_the_files():
    fake = scaled_down(CLUSTER, "10.0.0.1:6379")
    validate_config(prepare_config(fake))
    types = fake["available_node_types"]
    assert set(types) == {HEAD_TYPE, "decode", "train"}
    assert types[HEAD_TYPE]["resources"] == {"CPU": 0}
    for name in ("decode", "train"):
        given = CLUSTER["available_node_types"][name]
        assert types[name]["labels"] == given["labels"]
        assert types[name]["min_workers"] == given["min_workers"] == 0
        assert 2 <= types[name]["max_workers"] <= given["max_workers"]


def test_the_first_file_allows_fewer_nodes():
    types = scaled_down(CLUSTER, "10.0.0.1:6379", FEW, {"train": 1})["available_node_types"]
    assert types["train"]["max_workers"] == types["train"]["min_workers"] == 1
    assert types["decode"]["min_workers"] == 0
    assert types["decode"]["max_workers"] == FEW["decode"] == MOST["decode"]


@pytest.mark.parametrize(
    ("counts", "grew"), [([], False), ([1], False), ([2], False), ([2, 1, 2], False), ([1, 1, 2, 1], True)]
)
def test_growing_is_from_the_fewest_to_more(counts, grew):
    assert Timeline(workers=[(float(place), count) for place, count in enumerate(counts)]).grew() is grew


def test_a_node_is_replaced_by_one_that_came_after_it_was_killed():
    assert not MADE_UP.replaced()
    later = Moment(50.0, {"decode": ["1", "4"]}, {})
    assert Timeline([*MADE_UP.moments, later], MADE_UP.events).replaced()
    assert not Timeline([*MADE_UP.moments, later], []).replaced(), "none was killed"


def test_processes_on_nodes_that_are_not_for_them_are_named():
    assert MADE_UP.misplaced() == []
    wrong = {"head": ["Map(ingest)"], "train": ["Map(ingest)"], "decode": ["RayTrainWorker", "Map(ingest)"]}
    found = Timeline([Moment(3.0, {}, wrong)]).misplaced()
    assert found == [
        "Map(ingest) on a head node after 3 s",
        "Map(ingest) on a train node after 3 s",
        "RayTrainWorker on a decode node after 3 s",
    ]


def test_the_timeline_as_a_table_and_a_picture():
    lines = table(MADE_UP).splitlines()[2:]
    assert lines[0] == "| 0 | 0 | 0 |  |"
    assert lines[2] == "| 25 | 1 | 1 | decode node 00002 is killed |"
    assert lines[3] == "| 90 | 0 | 0 | the training ends with status 0 |"
    root = xml.etree.ElementTree.fromstring(picture(MADE_UP))
    words = [text.text for text in root.iter() if text.tag.endswith("text")]
    assert "decode node 00002 is killed" in words
    assert sum(element.tag.endswith("path") for element in root.iter()) == 2


def test_words_of_a_picture_do_not_cover_each_other():
    events = [
        (20.0, "training on 1 worker"),
        (25.0, "decode node 00002 is killed"),
        (88.0, "ends"),
        (90.0, "it is over"),
    ]
    root = xml.etree.ElementTree.fromstring(picture(Timeline(MADE_UP.moments, events)))
    boxes = [
        (float(text.get("x")), float(text.get("x")) + 6.0 * len(text.text), float(text.get("y")))
        for text in root.iter()
        if text.tag.endswith("text") and text.get("text-anchor") is None
    ]
    assert len(boxes) == len(events) + 2
    assert max(right for _, right, _ in boxes) <= 860
    for place, (left, right, height) in enumerate(boxes):
        for other_left, other_right, other_height in boxes[:place]:
            assert abs(height - other_height) >= 12 or right < other_left or other_right < left


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_nodes_come_are_replaced_and_go_again(tmp_path: Path):
    timeline = run(CLUSTER, tmp_path, steps=200)
    shown = table(timeline) + "\n" + (tmp_path / "train.log").read_text()[-3000:]
    assert timeline.status == 0, shown
    assert set(timeline.moments[0].nodes) == {"head"}, "the first job starts on a cluster without workers"
    assert timeline.grew(), f"{timeline.workers}\n{shown}"
    assert timeline.most("train") == MOST["train"], shown
    assert timeline.misplaced() == [], shown
    assert set(timeline.moments[-1].nodes) == {"head"}, shown
    assert timeline.replaced(), f"no node took the place of the one that was killed\n{shown}"


def _of_folder(folder: Path) -> dict[Any, str]:
    """Return the living processes whose command line or environment contains a text, with their command lines."""
    found = {}
    for process in psutil().process_iter():
        with suppress(psutil().Error):
            words = process.cmdline()
            told = any(str(folder) in word for word in (*words, *process.environ().values()))
            if told and process.pid != os.getpid() and process.status() != psutil().STATUS_ZOMBIE:
                found[process] = " ".join(words)
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_terminated_program_leaves_no_processes(number, status, tmp_path):
    short = Path(tempfile.mkdtemp(prefix="end-"))  # Ray's sockets need a short path
    environment = os.environ | {"TMPDIR": str(short), "RAY_TMPDIR": str(short)}
    command = [sys.executable, "-m", "dora_ray.chaos.autoscaling", "--cluster", str(ROOT / "cluster.yaml")]
    with (tmp_path / "log").open("wb") as log:
        program = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 900
        while not any("dora_ray train" in words for words in _of_folder(short).values()):
            assert program.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        assert any("gcs_server" in words for words in _of_folder(short).values()), (
            "the cluster is there, so it can be left behind"
        )
        program.send_signal(number)
        assert program.wait(timeout=300) == status, (tmp_path / "log").read_text()
        assert _of_folder(short) == {}
        assert list(short.glob("dora-autoscaling-*")) == []
    finally:
        end_session(program)
        for process in _of_folder(short):
            process.kill()
        shutil.rmtree(short, ignore_errors=True)
