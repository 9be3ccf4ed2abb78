"""Real checkpoint folders of a very small encoder, written as the training writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dora_ray.config import load_config
from dora_ray.method.dora import build_network
from dora_ray.weights import network_arguments

SMALL = (
    "model.width=24",
    "model.depth=3",
    "model.num_heads=3",
    "tracking.num_objects=2",
    "crops.global_size=32",
    "crops.local_size=16",
    "head.hidden_width=16",
    "head.bottleneck_width=8",
    "head.num_outputs=12",
)


def small_config(*overrides: str) -> dict[str, Any]:
    return load_config("tiny", *SMALL, *overrides).model_dump(mode="json")


def write_checkpoint(folder: Path, config: dict[str, Any], *, step: int = 7, complete: bool = True) -> Path:
    """A checkpoint whose student and teacher differ, so that a mix-up of the two shows."""
    folder.mkdir(parents=True)
    tensors = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        network = build_network(**network_arguments(config))
        for parameter in network.parameters():  # no tensor may stay at a value that a new network has as well
            parameter.data += 0.02 * torch.randn_like(parameter)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    meta = {
        "format": 3,
        "step": step,
        "config": config,
        "plan": {},
        "plan_digest": "0" * 64,
        "world_size": 1,
        "bad_clips": [],
        "versions": {"dora_ray": "0.1.0"},
        "files": {},
    }
    if complete:
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def teacher_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    prefix = "teacher.backbone."
    return {
        k.removeprefix(prefix): v for k, v in load_file(folder / "model.safetensors").items() if k.startswith(prefix)
    }
