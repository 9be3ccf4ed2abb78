"""What attempts leave behind, and which of their lines are the history."""

from __future__ import annotations

import io
import json
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from dora_ray import files
from dora_ray.training.records.journal import (
    Journal,
    add_event,
    read_events,
    read_history,
    read_lines,
    read_metrics,
    read_status,
    write_status,
)


def attempt(run: str, begin: int, steps: range, mark: int, world_size: int = 1) -> None:
    journal = Journal(run, step=begin, num_steps=10, world_size=world_size, entered=0.0)
    for step in steps:
        journal.ledger(step, [mark, step])
        journal.metrics(step + 1, {"loss": float(mark)})
    journal.close()


def read_scalars(run: str) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars of a run by name and step."""
    scalars = defaultdict[str, dict[int, float]](dict)
    for event in read_board(run):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                scalars[value.tag][event.step] = value.simple_value
    return scalars


def read_board(run: str) -> Iterator[Event]:
    """All events that TensorBoard shows of a run."""
    folder = files.join(run, "tensorboard")
    for name in files.list_names(folder):
        content = files.read_bytes(files.join(folder, name))
        while content:
            # A record is its length, that one's checksum, the event, its checksum.
            (size,) = struct.unpack_from("<Q", content)
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def test_tensorboard_shows_the_configuration_as_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.5\n")
    attempt(str(tmp_path), 0, range(2), mark=1)
    values = [value for event in read_board(str(tmp_path)) for value in event.summary.value]
    (text,) = [value for value in values if value.tag == "config/text_summary"]
    assert text.metadata.plugin_data.plugin_name == "text"
    assert text.tensor.string_val == [b"    optim:\n      lr: 0.5"]
    assert read_scalars(str(tmp_path))["loss"] == {1: 1.0, 2: 1.0}


def hyperparameters(run: str) -> dict[str, HParamsPluginData]:
    """What a run says to TensorBoard's table of hyperparameters, by tag."""
    values = [value for event in read_board(run) for value in event.summary.value]
    return {
        value.tag.removeprefix("_hparams_/"): HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for value in values
        if value.metadata.plugin_data.plugin_name == "hparams"
    }


def test_tensorboard_has_the_settings_in_its_table_of_hyperparameters(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "optim: {lr: 0.5, steps: 3, reduction: exact}\ndata: {videos: [a.mp4, b.mp4], store: null}\n"
        "run: {deterministic: true}\nevaluation: {images: photos, tour: null}\n"
    )
    journal = Journal(str(tmp_path), step=0, num_steps=3, world_size=1, entered=0.0)
    assert hyperparameters(str(tmp_path)).keys() == {"experiment", "session_start_info"}
    journal.event("end", step=3)
    journal.close()
    found = hyperparameters(str(tmp_path))
    settings = found["session_start_info"].session_start_info.hparams
    assert (settings["optim.lr"].number_value, settings["optim.steps"].number_value) == (0.5, 3)
    assert settings["run.deterministic"].bool_value
    assert settings["data.videos"].string_value == "['a.mp4', 'b.mp4']"
    measures = [info.name.tag for info in found["experiment"].experiment.metric_infos]
    assert measures == ["loss", "object_agreement", "object_overlap", "teacher_diversity", "knn"]
    assert found["session_end_info"].HasField("session_end_info")


def test_tensorboard_shows_pictures_and_distributions(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), step=0, num_steps=3, world_size=1, entered=0.0)
    picture = Image.effect_noise((30, 20), 50).convert("RGB")
    journal.picture(2, "objects", picture)
    journal.histogram(2, "center", np.linspace(-1, 1, 100, dtype=np.float32))
    journal.close()
    shown = {value.tag: (event.step, value) for event in read_board(str(tmp_path)) for value in event.summary.value}
    assert shown["objects"][0] == shown["center"][0] == 2
    read = Image.open(io.BytesIO(shown["objects"][1].image.encoded_image_string))
    assert read.tobytes() == picture.tobytes()
    assert Image.open(tmp_path / "pictures" / "step-00000002" / "objects.png").tobytes() == picture.tobytes()
    histogram = shown["center"][1].histo
    assert (histogram.num, histogram.min, histogram.max) == (100, -1.0, 1.0)


def test_a_picture_that_cannot_be_written_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("a file in its place")
    journal = Journal(str(tmp_path), step=0, num_steps=3, world_size=1, entered=0.0)
    journal.picture(2, "objects", Image.new("RGB", (3, 2)))
    journal.close()
    (warning,) = [event["message"] for event in read_events(str(tmp_path)) if event["event"] == "warning"]
    assert "objects.png cannot be written" in warning


def test_a_later_attempt_takes_back_what_was_lost(tmp_path: Path) -> None:
    run = str(tmp_path)
    attempt(run, 0, range(7), mark=1)
    attempt(run, 4, range(4, 6), mark=2, world_size=2)
    assert read_history(run) == {0: [1, 0], 1: [1, 1], 2: [1, 2], 3: [1, 3], 4: [2, 4], 5: [2, 5]}
    assert [(line["step"], line["attempt"]) for line in read_metrics(run)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 2),
        (6, 2),
    ]
    events = read_lines(str(tmp_path / "events.jsonl"))
    assert [(e["event"], e["attempt"]) for e in events] == [("start", 1), ("start", 2), ("resize", 2)]
    assert (events[-1]["before"], events[-1]["after"]) == (1, 2)


def test_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    attempt(str(tmp_path), 0, range(2), mark=1)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 2, "slo')
    assert list(read_history(str(tmp_path))) == [0, 1]
    attempt(str(tmp_path), 1, range(1, 3), mark=2)
    assert read_history(str(tmp_path)) == {0: [1, 0], 1: [2, 1], 2: [2, 2]}


def test_status_is_whole_json(tmp_path: Path) -> None:
    attempt(str(tmp_path), 0, range(1), mark=1)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"], status["world_size"]) == ("running", 1, 10, 1)


def test_a_resume_is_no_recovery(tmp_path: Path) -> None:
    """Ctrl-C in the evening, --resume in the morning: nobody waited for workers in between."""
    run, now = str(tmp_path), time.time()
    Journal(run, step=0, num_steps=9, world_size=1, entered=now)
    for event in ("leave", "launch", "group"):
        add_event(run, event)
    resumed = Journal(run, step=4, num_steps=9, world_size=1, entered=now)
    resumed.stepped(5, 0.1)
    resumed.close()
    assert "recovered" not in [line["event"] for line in read_events(run)]
    for event in ("leave", "group"):
        add_event(run, event)
    restarted = Journal(run, step=6, num_steps=9, world_size=1, entered=now)
    restarted.stepped(7, 0.1)
    restarted.close()
    assert [line["event"] for line in read_events(run)][-1] == "recovered"


def test_steps_lost_are_counted_from_the_last_status(tmp_path: Path) -> None:
    """The ledger in an object store is put at checkpoints, so it does not hold what came after the last one."""
    run, now = f"memory://{tmp_path.name}/lost", time.time()
    killed = Journal(run, step=0, num_steps=9, world_size=2, entered=now)
    for step in range(7):
        killed.ledger(step, [step])
        killed.metrics(step + 1, {"loss": 1.0})
        if step == 2:
            killed.flush()
    for event in ("failure", "group"):
        add_event(run, event)
    attempt = Journal(run, step=3, num_steps=9, world_size=1, entered=now)
    attempt.stepped(4, 0.1)
    attempt.metrics(4, {"loss": 0.5})
    attempt.close()
    (recovered,) = (line for line in read_events(run) if line["event"] == "recovered")
    assert recovered["steps_lost"] == 4
    scalars = read_scalars(run)
    assert (scalars["steps_lost"], scalars["world_size"], scalars["loss"]) == ({4: 4.0}, {4: 1.0}, {4: 0.5})
    assert scalars["recovery_seconds"].keys() == {4}
    killed.close()


def test_an_object_store_keeps_the_events_of_both_writers(tmp_path: Path) -> None:
    run = f"memory://{tmp_path.name}/run"
    journal = Journal(run, step=0, num_steps=9, world_size=1, entered=time.time())
    add_event(run, "notice")
    journal.event("checkpoint", step=3)
    add_event(run, "failure")
    journal.event("end", step=9)
    assert [line["event"] for line in read_events(run)] == ["start", "notice", "checkpoint", "failure", "end"]


def test_a_new_attempt_says_that_it_runs(tmp_path: Path) -> None:
    write_status(str(tmp_path), state="waiting")
    Journal(str(tmp_path), step=0, num_steps=9, world_size=3, entered=time.time())
    assert {name: read_status(str(tmp_path))[name] for name in ("state", "world_size")} == {
        "state": "running",
        "world_size": 3,
    }
