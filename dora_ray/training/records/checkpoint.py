"""Snapshots of a training's state, and what is read back from them; `dora_ray.checkpoints` has the folders' layout.

A snapshot copies the state in the step, on its own device; a background thread brings it to the CPU and writes it. The
run itself owns the folder, not Ray's checkpoint manager: a checkpoint must also be committed while Ray's controller is
busy with the resize that it is made for.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils import serialization

from dora_ray import files
from dora_ray.checkpoints import (
    MODEL,
    STATE,
    DamagedError,
    Meta,
    checkpoint_name,
    is_complete,
    prune,
    read_checked,
    read_meta,
    step_names,
    write_checkpoint,
)
from dora_ray.clips.plan import Plan
from dora_ray.config import Config
from dora_ray.errors import CheckpointError, DoRAError
from dora_ray.training.records.journal import Journal
from dora_ray.training.step import TrainState
from dora_ray.weights import require_architecture


@dataclass(frozen=True)
class Snapshot:
    """A training state apart from the one that trains on; `copied`: on a GPU, the moment from which on it is whole."""

    name: str
    model: dict[str, Tensor]
    state: dict[str, Any]
    meta: dict[str, Any]
    copied: torch.cuda.Event | None = None


def take_snapshot(state: TrainState, config: Config, plan: Plan, world_size: int) -> Snapshot:
    """Copy the state on its own device, which takes no longer than reading it: the step after it changes the state."""
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
        "step": state.step,
        "config": config.model_dump(mode="json"),
        "plan": plan.fingerprint,
        "plan_digest": plan.digest,
        "world_size": world_size,
        "bad_clips": list(state.bad_clips),
        "versions": dict(_versions("torch", "timm", "ray", "dora-ray")),
    }
    return Snapshot(checkpoint_name(state.step), model, tensors, meta, _now_on(state.center.device))


def _versions(*packages: str) -> Iterator[tuple[str, str]]:
    """Give the versions of installed packages: a step needs no Ray, and a copied folder of this one has no version."""
    for package in packages:
        with suppress(PackageNotFoundError):
            yield package, version(package)


def _now_on(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _on_host(snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors on the CPU, brought there beside the training: behind its kernels each would wait for a step."""
    if snapshot.copied is None:
        return snapshot.model, snapshot.state
    device = next(iter(snapshot.model.values())).device
    stream = torch.cuda.Stream(device)
    stream.wait_event(snapshot.copied)
    with torch.cuda.stream(stream):
        on_host = _to_host(snapshot.model), _to_host(snapshot.state)
    # The copies on the device are not needed while the files are written.
    snapshot.model.clear()
    snapshot.state.clear()
    return on_host


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    return _each(value, _copy)


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return _each(value, _to_host)


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [change(inner) for inner in value]
    return value


def write_snapshot(snapshot: Snapshot, checkpoints: str) -> str:
    """Write a snapshot below the folder `checkpoints`."""
    model, state = _on_host(snapshot)
    buffer = io.BytesIO()
    # The digests in meta.json say more, and what the writer computes it takes from the training.
    with serialization.config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(state, buffer)
    contents = {MODEL: safetensors.torch.save(model), STATE: buffer.getvalue()}
    return write_checkpoint(checkpoints, snapshot.name, contents, snapshot.meta)


class CheckpointWriter:
    """Writes snapshots in a thread of its own, one after the other, and keeps the newest few.

    A snapshot that cannot be written costs nothing that was written before it: training goes on, and `finish` says so.

    Args:
        checkpoints: folder of the checkpoints.
        keep: complete checkpoints kept.
        journal: told of every checkpoint; its lines that the weights have seen are made durable before it.

    Attributes:
        seconds: what writing the last checkpoint took.
    """

    def __init__(self, checkpoints: str, *, keep: int, journal: Journal) -> None:
        self._checkpoints, self._keep, self._journal = checkpoints, keep, journal
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] = Future()
        self._pending.set_result(None)
        self._failure = ""
        self.seconds = 0.0

    def start(self, snapshot: Snapshot, *, reason: str, copy_seconds: float) -> None:
        """Write a snapshot after the one before it."""
        self._pending.result()
        self._pending = self._pool.submit(self._write, snapshot, reason, copy_seconds)

    def _write(self, snapshot: Snapshot, reason: str, copy_seconds: float) -> None:
        started, step = time.monotonic(), snapshot.meta["step"]
        folder = files.join(self._checkpoints, snapshot.name)
        try:
            self._journal.flush()
            write_snapshot(snapshot, self._checkpoints)
        except (OSError, DoRAError, MemoryError) as error:
            self._failure = f"{folder} could not be written: {str(error) or type(error).__name__}"
            self._journal.event("warning", step=step, message=f"{self._failure}. The checkpoints before it are kept.")
            with suppress(OSError, DoRAError):  # half of it takes room that is lacking, perhaps
                files.remove(folder)
            return
        self._failure, self.seconds = "", time.monotonic() - started
        try:
            self._journal.checkpoint(
                snapshot.name, step, reason=reason, seconds=self.seconds, copy_seconds=copy_seconds
            )
            prune(self._checkpoints, keep=self._keep)
        except (OSError, DoRAError) as error:
            self._journal.event("warning", step=step, message=f"{self._checkpoints}: {error}")

    def busy(self) -> bool:
        """Return whether a snapshot is still being written."""
        return not self._pending.done()

    def failed(self) -> bool:
        """Return whether the last snapshot could not be written, once it is no longer being written."""
        self._pending.result()
        return bool(self._failure)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: the last snapshot could not be written.
        """
        if self.failed():
            raise CheckpointError(
                f"{self._failure}. The checkpoints before it are kept: make room, or give write access, and go on "
                "with --resume."
            )


def load_newest(checkpoints: str, state: TrainState, config: Config, plan: Plan) -> tuple[str | None, list[str]]:
    """Put the newest undamaged checkpoint into a newly made state.

    Returns:
        Its folder, None where there is no complete one; and a sentence for each newer one that was refused.

    Raises:
        CheckpointError: all are damaged; or the newest undamaged one is of another architecture, plan or format.
    """
    refused, damaged = list[str](), False
    for name in reversed(step_names(checkpoints)):
        folder = files.join(checkpoints, name)
        if not is_complete(folder):
            refused.append(f"{folder} is incomplete: its writer was interrupted.")
            continue
        try:
            load_state(folder, state, config, plan)
        except DamagedError as error:
            refused.append(str(error))
            damaged = True
        else:
            return folder, refused
    if damaged:
        raise CheckpointError(f"{' '.join(refused)} No good checkpoint is left: begin again with --overwrite.")
    return None, refused


def load_state(folder: str, state: TrainState, config: Config, plan: Plan) -> None:
    """Put a checkpoint into a newly made state.

    Raises:
        CheckpointError: it is incomplete, damaged, of another architecture, or of another plan; the message names what
            differs.
    """
    meta = read_meta(folder)
    require_architecture(folder, config.model_dump(mode="json"))
    require_plan(folder, meta, plan)
    model, content = read_checked(folder, MODEL, meta), read_checked(folder, STATE, meta)
    try:
        networks = safetensors.torch.load(model)
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler or zip reader does
        raise DamagedError(f"{folder} is damaged ({type(error).__name__}: {error}).") from error
    for which, network in (("student.", state.student), ("teacher.", state.teacher)):
        named = {name.removeprefix(which): value for name, value in networks.items() if name.startswith(which)}
        network.load_state_dict(named)
    state.optimizer.load_state_dict(tensors["optimizer"])
    state.center.copy_(tensors["center"])
    state.exponents = tensors["exponents"]
    state.step = tensors["step"]
    state.bad_clips = [int(number) for number in meta.bad_clips]


def require_plan(folder: str, meta: Meta, plan: Plan) -> None:
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
