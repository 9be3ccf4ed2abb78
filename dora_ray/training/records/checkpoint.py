"""Checkpoints of the training state: snapshot, write, load. `dora_ray.checkpoints` defines the folder layout.

A snapshot copies the state between steps, on its own device; a background thread moves it to the CPU and writes it.
The run owns the folder, not Ray's checkpoint manager: a checkpoint must be committed even while Ray's controller is
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
    """Copy of a training state. `copied`: on a GPU, the event after which the copy is complete."""

    name: str
    model: dict[str, Tensor]
    state: dict[str, Any]
    meta: dict[str, Any]
    copied: torch.cuda.Event | None = None


def take_snapshot(state: TrainState, config: Config, plan: Plan, world_size: int) -> Snapshot:
    """Copy the state on its own device, at memory bandwidth: the next step modifies the original."""
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
    """Yield the versions of installed packages: Ray is not needed for a step, a copied source folder has no version."""
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
    """Copy the tensors to the CPU on a stream of its own: on the training's, each would wait for a step's kernels."""
    if snapshot.copied is None:
        return snapshot.model, snapshot.state
    device = next(iter(snapshot.model.values())).device
    stream = torch.cuda.Stream(device)
    stream.wait_event(snapshot.copied)
    with torch.cuda.stream(stream):
        on_host = _to_host(snapshot.model), _to_host(snapshot.state)
    # Free the copies on the device before the files are written.
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
    """Write a snapshot into the folder `checkpoints`; return the checkpoint's folder."""
    model, state = _on_host(snapshot)
    buffer = io.BytesIO()
    # The digests in meta.json check more than CRC32 would, and its CPU time would be taken from training.
    with serialization.config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(state, buffer)
    contents = {MODEL: safetensors.torch.save(model), STATE: buffer.getvalue()}
    return write_checkpoint(checkpoints, snapshot.name, contents, snapshot.meta)


class CheckpointWriter:
    """Writes snapshots in a background thread, one after the other, and keeps the newest few.

    A failed write leaves the older checkpoints intact and training continues; `finish` raises it.

    Args:
        checkpoints: folder of the checkpoints.
        keep: number of complete checkpoints to keep.
        journal: records every checkpoint; its earlier lines are flushed before the checkpoint is written.

    Attributes:
        seconds: time that writing the last checkpoint took.
    """

    def __init__(self, checkpoints: str, *, keep: int, journal: Journal) -> None:
        self._checkpoints, self._keep, self._journal = checkpoints, keep, journal
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] = Future()
        self._pending.set_result(None)
        self._failure = ""
        self.seconds = 0.0

    def start(self, snapshot: Snapshot, *, reason: str, copy_seconds: float) -> None:
        """Write a snapshot in the background, once the previous one is written."""
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
            self._journal.event("warning", step=step, message=f"{self._failure}. Earlier checkpoints are kept.")
            with suppress(OSError, DoRAError):  # a partial checkpoint takes space that may be lacking
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
        """Wait for the last write; return whether it failed."""
        self._pending.result()
        return bool(self._failure)

    def finish(self) -> None:
        """Wait for the last write.

        Raises:
            CheckpointError: the last snapshot could not be written.
        """
        if self.failed():
            raise CheckpointError(
                f"{self._failure}. Earlier checkpoints are kept: free disk space or grant write access, and continue "
                "with --resume."
            )


def load_newest(checkpoints: str, state: TrainState, config: Config, plan: Plan) -> tuple[str | None, list[str]]:
    """Load the newest undamaged checkpoint into a new state.

    Returns:
        The checkpoint's folder, None if there is no complete one; and a sentence for each newer one that was refused.

    Raises:
        CheckpointError: all are damaged, or the newest undamaged one has another architecture, plan or format.
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
        raise CheckpointError(f"{' '.join(refused)} No good checkpoint is left: start again with --overwrite.")
    return None, refused


def load_state(folder: str, state: TrainState, config: Config, plan: Plan) -> None:
    """Load a checkpoint into a new state.

    Raises:
        CheckpointError: it is incomplete or damaged, or has another architecture or plan; the message names the
            difference.
    """
    meta = read_meta(folder)
    require_architecture(folder, config.model_dump(mode="json"))
    require_plan(folder, meta, plan)
    model, content = read_checked(folder, MODEL, meta), read_checked(folder, STATE, meta)
    try:
        networks = safetensors.torch.load(model)
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises any error of its unpickler or zip reader
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
    """Refuse to continue with other clips than the checkpoint was trained on.

    Raises:
        CheckpointError: the plan differs; the message names every part that changed.
    """
    if meta.plan_digest == plan.digest:
        return
    ours, theirs = json.loads(json.dumps(plan.fingerprint)), meta.plan
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    details = "; ".join(f"{key}: {theirs.get(key)} in the checkpoint, {ours.get(key)} now" for key in changed)
    raise CheckpointError(
        f"{folder} was trained on another plan, so training cannot continue from it. Changed: {details}. "
        "Use the checkpoint's settings and videos, or start a new run with another --out."
    )
