"""The configuration: what it accepts, and what it answers to what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dora_ray.config import Config, load_config
from dora_ray.config_section import keys_of
from dora_ray.config_source import flatten, recipe_names
from dora_ray.errors import ConfigError


@pytest.mark.parametrize("name", ["paper", "paper-vit-b", "paper-vit-l", "released", "tiny"])
def test_every_recipe_loads(name: str) -> None:
    assert name in recipe_names()
    assert isinstance(load_config(name), Config)


def test_paper_is_the_default() -> None:
    assert load_config("paper") == Config()


def test_paper_and_released_differ_as_the_method_says() -> None:
    paper, released = (flatten(load_config(name).model_dump()) for name in ("paper", "released"))
    different = {key: released[key] for key in paper if paper[key] != released[key]}
    assert different == {
        "tracking.block": -1,
        "tracking.threshold": "batch",
        "tracking.heads_per": "slot",
        "loss.reduction": "released",
        "crops.local_size": 112,
        "crops.local_interpolation": "bicubic",
        "model.position_interpolation": "released",
        "model.cls_token_std": 0.02,
        "head.last_layer_init": "uniform",
    }


def test_tiny_has_heads_enough_for_sweeps() -> None:
    assert load_config("tiny").model.num_heads >= 6


def test_architecture_gives_the_sizes() -> None:
    model = load_config({"model": {"name": "vit_base_patch16_224", "depth": 3}}).model
    assert (model.width, model.depth, model.num_heads) == (768, 3, 12)


def test_overrides_win_over_file_over_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: tiny\noptim: {lr: 0.5, steps: 177}\n")
    optim = load_config(str(path), "optim.steps=188").optim
    assert (optim.lr, optim.steps, optim.slots) == (0.5, 188, load_config("tiny").optim.slots)


@pytest.mark.parametrize("word", ["{name}", "[{name}]", '["{name}"]'])
@pytest.mark.parametrize("name", ["dog.mp4", "Venice, Italy [id].mp4", "a: b #1.mp4"])
def test_one_film_needs_no_list_whatever_its_name(word: str, name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert load_config("tiny", f"data.videos={word.format(name=name)}").data.videos == (name,)


def test_a_film_alone_in_a_file_or_a_mapping() -> None:
    assert load_config({"data": {"videos": "s3://b/walk.mp4"}}).data.videos == ("s3://b/walk.mp4",)
    assert load_config("tiny", {"data": {"videos": [Path("a.mp4"), "b.mp4"]}}).data.videos == ("a.mp4", "b.mp4")


@pytest.mark.parametrize("value", ["[id] x.mp4", "[a.mp4,", "5"])
def test_films_that_are_no_list_are_answered_with_an_example_that_works(value: str) -> None:
    with pytest.raises(ConfigError, match="quote the whole word") as caught:
        load_config("tiny", f"data.videos={value}")
    example = str(caught.value).partition("'data.videos=")[2].rpartition("'")[0]
    assert load_config("tiny", f"data.videos={example}").data.videos == ("Venice, Italy [id].mp4", "b.mp4")


def test_overrides_may_be_mappings() -> None:
    optim = load_config("tiny", {"optim": {"steps": 500}}, {"optim.lr": 0.5}, "optim.slots=4").optim
    assert (optim.steps, optim.lr, optim.slots) == (500, 0.5, 4)
    with pytest.raises(ConfigError, match=r"3 is not an override: write 'optim\.steps=300'"):
        load_config("tiny", 3)  # type: ignore[arg-type]


def test_spans_are_steps_or_shares_of_the_run() -> None:
    assert load_config("tiny").optim.num_warmup_steps == 80
    short = load_config("tiny", "optim.steps=60").optim
    assert (short.num_warmup_steps, short.num_frozen_steps) == (12, 12)
    counted = load_config("tiny", "optim.warmup_steps=1", "optim.freeze_last_layer_steps=0").optim
    assert (counted.num_warmup_steps, counted.num_frozen_steps) == (1, 0)
    paper = load_config("paper").optim
    assert (paper.num_warmup_steps, paper.num_frozen_steps) == (30_900, 3090)
    with pytest.raises(ConfigError, match=r"as a share of the run, such as optim\.warmup_steps=0\.2"):
        load_config("tiny", "optim.warmup_steps=401")


def test_override_in_scientific_notation() -> None:
    assert load_config("tiny", "optim.lr=1e-3").optim.lr == 1e-3


def test_dump_and_load_round_trip() -> None:
    config = load_config("tiny", "cluster.num_workers=[1, 2]")
    assert load_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_fixed_names_exist() -> None:
    fixed = [
        "model.name",
        "model.width",
        "model.depth",
        "model.num_heads",
        "model.drop_path",
        "data.videos",
        "data.store",
        "data.decoder",
        "data.frames_per_second",
        "data.short_side",
        "clip.num_frames",
        "clip.stride_seconds",
        "clip.avoid_cuts",
        "crops.num_locals",
        "crops.local_size",
        "crops.global_size",
        "crops.num_globals",
        "tracking.kind",
        "tracking.num_objects",
        "tracking.block",
        "tracking.normalize_patches",
        "tracking.num_iterations",
        "tracking.epsilon",
        "tracking.threshold",
        "loss.student_temperature",
        "loss.teacher_temperature",
        "loss.center_momentum",
        "loss.reduction",
        "head.num_outputs",
        "optim.steps",
        "optim.slots",
        "optim.clips_per_slot",
        "optim.lr",
        "optim.warmup_steps",
        "optim.freeze_last_layer_steps",
        "optim.weight_decay",
        "optim.teacher_momentum",
        "optim.reduction",
        "cluster.num_workers",
        "cluster.use_gpu",
        "run.seed",
        "run.checkpoint_seconds",
        "evaluation.images",
        "evaluation.every_steps",
    ]
    assert set(fixed) <= set(keys_of(Config))


def test_every_field_is_documented() -> None:
    for name, section in Config.model_fields.items():
        for key, field in section.default.__class__.model_fields.items():
            assert field.description, f"{name}.{key} has no docstring"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("optim.lrr=1",), ["optim.lrr", "Did you mean optim.lr?"]),
        (("num_objects=2",), ["num_objects", "Did you mean tracking.num_objects?"]),
        (("tracking.num_objects=7",), ["tracking.num_objects=7", "6 attention heads", "at most 6"]),
        (("cluster.num_workers=3",), ["cluster.num_workers=3", "2 slots", "at most 2"]),
        (("cluster.num_workers=[2, 1]",), ["[fewest, most]"]),
        (("tracking.kind=foo",), ["tracking.kind='foo'", "'dora', 'none' or 'random'"]),
        (("tracking.block=-9",), ["tracking.block=-9", "4 blocks"]),
        (("crops.local_size=33",), ["crops.local_size=33", "multiple of the patch size 8"]),
        (("model.name=vit_huge",), ["vit_huge", "vit_small_patch16_224"]),
        (("model.num_heads=7",), ["96", "7"]),
        (("optim.lr=fast",), ["optim.lr='fast'", "number"]),
        (("optim.lr",), ["write key=value"]),
        (("crops.num_globals=2",), ["crops.num_globals=2", "1 global view"]),
        (("tracking.views=packed", "tracking.threshold=soft"), ["tracking.views=packed", "use clip or batch"]),
        (("tracking.every_steps=2", "crops.num_locals=0"), ["tracking.every_steps=2", "no loss"]),
        (("tracking.every_steps=2", "loss.reduction=released"), ["tracking.every_steps=2", "running sum"]),
        (("clip.num_frames=1",), ["clip.num_frames=1", "greater than or equal to 2"]),
        (("clip.stride_seconds=0.01",), ["clip.stride_seconds=0.01", "12 frames per second"]),
        (("optim.warmup_steps=9999",), ["optim.warmup_steps=9999"]),
        (("data.decode_seconds=225",), ["cluster.stall_seconds=900", "4 hanging attempts", "set more than 900"]),
    ],
)
def test_bad_values_are_answered(overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", *overrides)
    for word in words:
        assert word in str(caught.value)


def test_kind_none_alone_makes_the_baseline() -> None:
    assert load_config("tiny", "tracking.kind=none").num_globals == 2


def test_malformed_yaml_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("optim:\n  lr: [1, 2\nrun: {seed: 1}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML: line 3, column"):
        load_config(str(path))


def test_yaml_that_is_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(str(path))


def test_base_that_leads_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(ConfigError, match="is circular"):
        load_config(str(path))


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean tiny"):
        load_config("tinny")
