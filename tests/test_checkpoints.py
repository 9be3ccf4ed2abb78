"""Folders of checkpoints: which one a path means, and what is incomplete, damaged or of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_ray import load_backbone
from dora_ray.checkpoints import read_meta, resolve_checkpoint
from dora_ray.errors import CheckpointError
from tests.evaluation.checkpoints import small_config, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two complete checkpoints, `latest` naming the newer one."""
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints" / "step-00000010", small_config(), step=10)
    write_checkpoint(run / "checkpoints" / "step-00000020", small_config("model.width=36"), step=20)
    (run / "checkpoints" / "latest").write_text("step-00000020\n")
    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-00000007", small_config())


def test_a_checkpoint_is_itself(checkpoint):
    assert resolve_checkpoint(checkpoint) == str(checkpoint)
    assert resolve_checkpoint(f"{checkpoint}/") == str(checkpoint)


@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_a_run_is_the_checkpoint_that_latest_names(run, below):
    assert resolve_checkpoint(run / below) == str(run / "checkpoints" / "step-00000020")
    (run / "checkpoints" / "latest").write_text("step-00000010")
    assert read_meta(run / below).step == 10


def test_a_run_falls_back_to_its_newest_complete_checkpoint(run):
    write_checkpoint(run / "checkpoints" / "step-00000030", small_config(), step=30, complete=False)
    for latest in ("step-00000030", "step-00000099"):
        (run / "checkpoints" / "latest").write_text(latest)
        assert read_meta(run).step == 20
    (run / "checkpoints" / "latest").unlink()
    assert read_meta(run).step == 20


def test_a_run_without_complete_checkpoint_is_refused(tmp_path):
    write_checkpoint(tmp_path / "checkpoints" / "step-00000030", small_config(), complete=False)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_an_incomplete_checkpoint_names_the_last_good_one(run):
    incomplete = write_checkpoint(run / "checkpoints" / "step-00000030", small_config(), complete=False)
    with pytest.raises(CheckpointError, match=r"no meta\.json.*step-00000020"):
        load_backbone(incomplete)


def test_a_missing_folder_and_a_foreign_folder_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_checkpoint(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        resolve_checkpoint(tmp_path)


def test_the_meta_data_come_back(checkpoint):
    meta = read_meta(checkpoint)
    assert (meta.step, meta.world_size, meta.bad_clips) == (7, 1, [])
    assert meta.config == small_config()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged"), ("[]", "damaged"), ('{"step": 1}', "damaged"), ('{"format": 2}', "format 2.*reads format 3")],
)
def test_a_damaged_or_unknown_meta_is_refused(checkpoint, content, message):
    (checkpoint / "meta.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_meta(checkpoint)


def test_a_meta_that_lacks_a_field_names_it(checkpoint):
    meta = json.loads((checkpoint / "meta.json").read_text())
    del meta["plan_digest"]
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="plan_digest"):
        read_meta(checkpoint)
