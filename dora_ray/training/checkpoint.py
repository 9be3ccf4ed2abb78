"""Checkpoints: step-00001234/{model.safetensors, state.pt, meta.json}; meta.json is written last, then `latest`.

A folder without meta.json is incomplete and never read. A snapshot copies the state to the CPU in the step; writing it
is left to a background thread.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dora_ray import files, weights
from dora_ray.config import Config
from dora_ray.data.plan import Plan
from dora_ray.errors import CheckpointError
from dora_ray.training.step import TrainState

MODEL, STATE, META, LATEST = "model.safetensors", "state.pt", "meta.json", "latest"


def checkpoint_name(step: int) -> str:
    """The folder's name."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Snapshot:
    """A training state on the CPU, apart from the one that trains on."""

    name: str
    model: dict[str, Tensor]
    state: dict[str, Any]
    meta: dict[str, Any]


def take_snapshot(state: TrainState, config: Config, plan: Plan, world_size: int) -> Snapshot:
    """Copy the state to the CPU."""
    networks = {"student": state.student, "teacher": state.teacher}
    model = {
        f"{which}.{name}": _copy(tensor) for which, net in networks.items() for name, tensor in net.state_dict().items()
    }
    tensors = {
        "optimizer": _copy(state.optimizer.state_dict()),
        "center": _copy(state.center),
        "exponents": _copy(state.exponents),
        "step": state.step,
    }
    meta = {
        "format": weights.FORMAT,
        "step": state.step,
        "config": config.model_dump(mode="json"),
        "plan": plan.fingerprint,
        "plan_digest": plan.digest,
        "world_size": world_size,
        "bad_clips": list(state.bad_clips),
        "versions": {package: version(package) for package in ("torch", "timm", "ray", "dora-ray")},
    }
    return Snapshot(checkpoint_name(state.step), model, tensors, meta)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value


def write_snapshot(snapshot: Snapshot, checkpoints: str) -> str:
    """Write a snapshot below the folder `checkpoints`; what a killed writer left under the name is removed first."""
    folder = files.join(checkpoints, snapshot.name)
    files.remove(folder)
    files.make_folder(folder)
    buffer = io.BytesIO()
    torch.save(snapshot.state, buffer)
    files.write_bytes(files.join(folder, MODEL), safetensors.torch.save(snapshot.model))
    files.write_bytes(files.join(folder, STATE), buffer.getvalue())
    files.write_text(files.join(folder, META), json.dumps(snapshot.meta, indent=1))
    files.write_text(files.join(checkpoints, LATEST), snapshot.name + "\n")
    return folder


def load_state(folder: str, state: TrainState, config: Config, plan: Plan) -> None:
    """Put a checkpoint into a newly made state.

    Raises:
        CheckpointError: it is incomplete, damaged, of another architecture, or of another plan; the message names what
            differs.
    """
    meta = weights.read_meta(folder)
    weights.require_architecture(folder, config.model_dump(mode="json"))
    require_plan(folder, meta, plan)
    tensors = _read_state(folder)
    state.student.load_state_dict(weights.load_network(folder, which="student").state_dict())
    state.teacher.load_state_dict(weights.load_network(folder, which="teacher").state_dict())
    state.optimizer.load_state_dict(tensors["optimizer"])
    state.center.copy_(tensors["center"])
    state.exponents = tensors["exponents"]
    state.step = tensors["step"]
    state.bad_clips = [int(number) for number in meta.bad_clips]


def _read_state(folder: str) -> dict[str, Any]:
    path = files.join(folder, STATE)
    try:
        tensors = torch.load(io.BytesIO(files.read_bytes(path)), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {STATE}: it holds weights, but nothing to resume from.") from error
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader does
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}). Resume from an earlier checkpoint."
        ) from error
    return dict(tensors)


def require_plan(folder: str, meta: weights.Meta, plan: Plan) -> None:
    """Refuse to go on with other clips than the checkpoint was trained with.

    Raises:
        CheckpointError: naming every part of the plan that changed.
    """
    if meta.plan_digest == plan.digest:
        return
    ours, theirs = json.loads(json.dumps(plan.fingerprint)), meta.plan
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    details = "; ".join(f"{key}: {theirs.get(key)} in the checkpoint, {ours.get(key)} now" for key in changed)
    raise CheckpointError(
        f"{folder} was trained on another plan, so its history could not be continued. Changed: {details}. "
        "Give the settings and videos of the checkpoint, or start a new run in another --out folder."
    )
