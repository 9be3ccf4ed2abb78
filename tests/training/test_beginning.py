"""Trainings that begin with given weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from dora_ray import export, load_backbone, train
from dora_ray.config import Config, load_config
from dora_ray.errors import CheckpointError, ConfigError
from dora_ray.method.vit import build_vit
from dora_ray.training.beginning import begin_with_given, with_resolved_init
from dora_ray.training.launch import check
from dora_ray.training.records.journal import read_events
from dora_ray.training.step import initial_state
from tests.conftest import SMALL
from tests.evaluation.checkpoints import write_checkpoint

CPU = torch.device("cpu")
# Heads of 64, as a file of weights must have them.
WIDE = ("model.width=128", "model.num_heads=2", "tracking.num_objects=2")


def config_of(*overrides: str) -> Config:
    return load_config("tiny", *SMALL, *overrides)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of the same networks, its student and its teacher unlike each other and any new network."""
    return write_checkpoint(tmp_path / "other" / "checkpoints" / "step-00000003", config_of().model_dump(mode="json"))


def test_student_and_teacher_begin_as_the_given_teacher(source: Path) -> None:
    config = config_of(f"model.init={source}")
    state = initial_state(config, CPU)
    words = begin_with_given(state, config)
    assert words == f"Training starts from the weights of {source}, head included."
    given = load_backbone(source).state_dict()
    for network in (state.student, state.teacher):
        assert all(torch.equal(value, given[name]) for name, value in network.backbone.state_dict().items())
    assert torch.equal(state.student.head.last_layer.direction, state.teacher.head.last_layer.direction)
    drawn = initial_state(config, CPU)
    assert not torch.equal(state.student.head.last_layer.direction, drawn.student.head.last_layer.direction)
    assert begin_with_given(drawn, config_of()) is None


def test_a_head_of_another_size_begins_anew_and_is_named(source: Path) -> None:
    config = config_of(f"model.init={source}", "head.num_outputs=48")
    state, drawn = initial_state(config, CPU), initial_state(config, CPU)
    words = begin_with_given(state, config)
    assert words is not None
    assert "the head is initialized randomly: theirs does not fit: 2 of another shape" in words
    assert "(last_layer.direction (32, 16)" in words
    assert torch.equal(state.student.head.last_layer.direction, drawn.student.head.last_layer.direction)


def test_an_export_has_no_head_and_another_grid_is_resampled(source: Path, tmp_path: Path) -> None:
    out = export(source, tmp_path / "export")
    config = config_of(f"model.init={out}", "crops.global_size=48")
    state = initial_state(config, CPU)
    words = begin_with_given(state, config)
    assert words is not None
    assert "resampled from 4 x 4 to 6 x 6 patches; the head is initialized randomly: the source has none." in words
    expected = resample_abs_pos_embed(load_backbone(out).pos_embed, new_size=[6, 6])
    assert torch.equal(state.student.backbone.pos_embed, expected)


def test_a_file_of_the_released_code_gives_encoder_and_head(tmp_path: Path) -> None:
    config = config_of(*WIDE, f"model.init={tmp_path / 'released.pth'}")
    torch.manual_seed(7)
    theirs = initial_state(load_config(config, "run.seed=9"), CPU).student
    tensors = {f"module.backbone.{name}": value for name, value in theirs.backbone.state_dict().items()}
    names = {"last_layer.gain": "last_layer.weight_g", "last_layer.direction": "last_layer.weight_v"}
    tensors |= {f"module.head.{names.get(name, name)}": value for name, value in theirs.head.state_dict().items()}
    torch.save({"teacher": tensors, "student": {}, "epoch": 1}, tmp_path / "released.pth")
    state = initial_state(config, CPU)
    begin_with_given(state, config)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, state.student.state_dict()[name])
        assert torch.equal(value, state.teacher.state_dict()[name])


def test_a_model_of_timms_is_begun_with(tmp_path: Path) -> None:
    vit = build_vit(
        name="vit_tiny_patch16_224", width=48, depth=2, num_heads=6, patch_size=8, image_size=32, drop_path=0.0
    )
    arguments = {"embed_dim": 48, "depth": 2, "num_heads": 6, "patch_size": 8, "img_size": 32}
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "vit_tiny_patch16_224",
                "num_classes": 0,
                "model_args": arguments,
                "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 0},
            }
        )
    )
    from safetensors.torch import save_file

    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True) is not None
    config = config_of(f"model.init=timm:local-dir:{tmp_path}")
    state = initial_state(config, CPU)
    begin_with_given(state, config)
    assert torch.equal(state.teacher.backbone.pos_embed, vit.pos_embed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=96", r"width 48 \(configured: 96\)"),
        ("model.depth=3", r"depth 2 \(configured: 3\)"),
        ("model.patch_size=16", "16"),
    ],
)
def test_another_encoder_is_refused_before_anything_starts(source: Path, tmp_path: Path, override, message) -> None:
    config = config_of(f"model.init={source}", override)
    with pytest.raises(CheckpointError, match=f"does not match the configured encoder.*{message}"):
        with_resolved_init(config, str(tmp_path / "run"), resume=False, overwrite=False)


def test_given_weights_that_would_be_overwritten_are_refused(source: Path) -> None:
    run = str(source.parent.parent)
    with pytest.raises(ConfigError, match="would be overwritten"):
        with_resolved_init(config_of(f"model.init={run}"), run, resume=False, overwrite=True)


def test_a_run_begins_with_another_and_resumes_without_it(small: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    """The plan is the same with and without given weights; the run's folder says what it began with."""
    other, out = source.parent.parent, tmp_path / "run"
    config = load_config("tiny", *small, f"model.init={other}", "optim.steps=2", "optim.lr=1e-9")
    assert f"Training starts from the weights of {source}" in str(check(config, out=out).given)
    result = train(config, out=out)
    given, trained = load_backbone(source), load_backbone(result.checkpoint)
    torch.testing.assert_close(trained.pos_embed, given.pos_embed, rtol=0, atol=1e-5)
    assert [event["message"] for event in read_events(str(out)) if event["event"] == "init"]
    assert load_config(str(out / "config.yaml")).model.init == str(source)
    for path in sorted(source.iterdir()):
        path.unlink()
    drawn = load_config("tiny", *small, "optim.steps=3")
    again = train(load_config(drawn, f"model.init={source}"), out=out, resume=True)
    assert again.checkpoint.endswith("step-00000003")
    assert len([event for event in read_events(str(out)) if event["event"] == "init"]) == 1
    with pytest.raises(CheckpointError):
        train(load_config(drawn, f"model.init={source}"), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
