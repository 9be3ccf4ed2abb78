from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from dora_ray import export, load_backbone
from dora_ray.checkpoints import read_meta, resolve_checkpoint
from dora_ray.errors import CheckpointError, ConfigError
from dora_ray.weights import random_backbone, require_architecture
from tests.evaluation.checkpoints import small_config, teacher_tensors, write_checkpoint

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


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


def test_the_backbone_is_the_teacher(checkpoint):
    backbone = load_backbone(checkpoint)
    saved = teacher_tensors(checkpoint)
    assert not backbone.training
    assert backbone.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_cut_off_weights_are_refused(checkpoint, kept):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        load_backbone(checkpoint)


def test_a_damaged_newest_checkpoint_names_the_one_before(run):
    (run / "checkpoints" / "step-00000020" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000020.*damaged.*step-00000010"):
        load_backbone(run)


def test_garbage_and_missing_weights_are_refused(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        load_backbone(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_backbone(checkpoint)


@pytest.mark.parametrize(
    ("override", "named"),
    [("model.width=36", "36 wide"), ("model.depth=2", "2 deep"), ("model.patch_size=16", "patch 16")],
)
def test_weights_of_another_architecture_name_both(checkpoint, override, named):
    meta = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps(meta | {"config": small_config(override)}))
    with pytest.raises(CheckpointError, match=f"a ViT 24 wide, 3 deep, patch 8.*{named}"):
        load_backbone(checkpoint)


def test_another_architecture_than_asked_for_is_refused(checkpoint):
    require_architecture(checkpoint, small_config("model.drop_path=0.3", "optim.lr=1e-2"))
    with pytest.raises(CheckpointError, match=r"num_heads 3 \(here 6\)"):
        require_architecture(checkpoint, small_config("model.num_heads=6"))
    with pytest.raises(CheckpointError, match=r"num_outputs 12 \(here 99\)"):
        require_architecture(checkpoint, small_config("head.num_outputs=99"))


def test_an_export_reloads_in_timm_bit_for_bit(run, tmp_path):
    out = export(run, tmp_path / "deep" / "export")
    assert out == tmp_path / "deep" / "export"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["export"]
    stock = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours, again = load_backbone(run), load_backbone(out)
    with torch.no_grad():
        for size in (32, 48):
            images = torch.rand(2, 3, size, size)
            expected = ours.forward_features(images)
            assert torch.equal(stock.forward_features(images), expected)
            assert torch.equal(stock(images), expected[:, 0])
            assert torch.equal(again.forward_features(images), expected)


def test_an_export_says_how_to_prepare_images(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "export")
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert list(data["input_size"]) == [3, 32, 32]
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert model.num_classes == 0
    card = (out / "README.md").read_text()
    assert "the teacher after 7 steps" in card
    assert "local-dir:" in card


def test_a_loaded_encoder_says_what_images_it_takes(checkpoint, tmp_path):
    """timm's own configuration of the architecture would say mean and deviation 0.5, and 224 px."""
    expected = {"input_size": (3, 32, 32), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    for source in (checkpoint, export(checkpoint, tmp_path / "export")):
        for backbone in (load_backbone(source), random_backbone(source, seed=0)):
            found = timm.data.resolve_model_data_config(backbone)
            assert {name: tuple(found[name]) for name in expected} == expected
            assert found["interpolation"] == "bicubic"


def test_an_export_never_overwrites(checkpoint, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    export(checkpoint, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        export(checkpoint, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ConfigError, match="local folder"):
        export(checkpoint, "s3://bucket/export")


def test_a_failed_export_leaves_nothing(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        export(checkpoint, tmp_path / "out" / "export")
    assert not (tmp_path / "out" / "export").exists()


def test_an_export_has_no_meta(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "export")
    with pytest.raises(CheckpointError, match="an exported encoder"):
        read_meta(out)
    (out / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a timm configuration"):
        load_backbone(out)


def test_a_random_backbone_is_repeatable_and_touches_no_global_state(checkpoint, tmp_path):
    state = torch.random.get_rng_state()
    first, second, other = (random_backbone(checkpoint, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.cls_token, second.cls_token)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    exported = random_backbone(export(checkpoint, tmp_path / "export"), seed=0)
    assert exported.state_dict().keys() == first.state_dict().keys()


def test_a_checkpoint_behind_a_uri_loads(checkpoint):
    import fsspec

    remote = fsspec.filesystem("memory")
    remote.put(f"{checkpoint}/", "memory://runs/a/checkpoints/step-00000007/", recursive=True)
    try:
        assert resolve_checkpoint("memory://runs/a") == "memory://runs/a/checkpoints/step-00000007"
        saved = teacher_tensors(checkpoint)
        assert torch.equal(load_backbone("memory://runs/a").cls_token, saved["cls_token"])
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve_checkpoint("memory://runs/b")
    finally:
        remote.rm("memory://runs", recursive=True)
