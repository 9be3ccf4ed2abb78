"""Checkpoint folders of a run: naming, lookup, writing, reading and pruning.

    checkpoints/
        latest                  name of the newest checkpoint; written after it
        step-00001234/
            model.safetensors   student.backbone.*  student.head.*  teacher.backbone.*  teacher.head.*
            state.pt            optimizer, center and scales
            meta.json           format, step, configuration, plan, versions, digests of the other two; written last
        damaged-step-00001200/  a checkpoint that could not be read

A folder without meta.json is incomplete and never read. `dora_ray.weights` handles the encoder in these files, and
`dora_ray.training.records.checkpoint` the training state; this module does not import torch. All folders may be URIs
such as s3://.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_ray import files
from dora_ray.errors import CheckpointError

CHECKPOINTS = "checkpoints"
MODEL, STATE, META, LATEST = "model.safetensors", "state.pt", "meta.json", "latest"
# Configuration file beside MODEL in an exported encoder's folder.
EXPORT_CONFIG = "config.json"
DAMAGED = "damaged-"
FORMAT = 3
# Weights from elsewhere: suffixes of weight files, and the prefix of timm model names.
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
TIMM = "timm:"
_KINDS = (
    "Give a checkpoint (step-00001234), a run's folder, a folder written by `dora-ray export`, a file of weights "
    "(.pth), or timm:NAME."
)
_STEP_NAME = re.compile(r"step-\d+")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Meta:
    """Content of meta.json.

    Attributes:
        step: Optimizer steps done.
        config: The run's configuration, from `Config.model_dump(mode="json")`.
        plan: Parts of the configuration and of the videos' indexes that determine the content of slots.
        plan_digest: Hash of `plan`; a resume with another digest is refused.
        world_size: Number of training workers when the checkpoint was written.
        bad_clips: Clips that could not be decoded and got weight 0.
        versions: Package versions when the checkpoint was written.
        files: Content hash of each of the other files.
    """

    step: int
    config: dict[str, Any]
    plan: dict[str, Any]
    plan_digest: str
    world_size: int
    bad_clips: list[Any]
    versions: dict[str, str]
    files: dict[str, str]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint after `step` steps."""
    return f"step-{step:08d}"


def is_complete(folder: str) -> bool:
    """Return whether a checkpoint was written completely."""
    return files.exists(files.join(folder, META))


def is_export(names: list[str]) -> bool:
    """Return whether a folder with these file names is an exported encoder (a timm model)."""
    return {EXPORT_CONFIG, MODEL} <= set(names)


def is_weights_file(path: str) -> bool:
    """Return whether a path is a weights file by its suffix, as the released code writes."""
    return path.endswith(WEIGHT_SUFFIXES)


def resolve_checkpoint(path: PathLike) -> str:
    """Resolve a path: a checkpoint, an export or a weights file to itself, a run to its newest checkpoint.

    Names such as timm:vit_small_patch16_224.dino are returned unchanged.

    Raises:
        CheckpointError: the path does not exist, is none of these, or is a run without a complete checkpoint.
    """
    if str(path).startswith(TIMM):
        return str(path)
    folder = files.absolute(path)
    # Check this before listing: to list a file, a web server may send all of it.
    if is_weights_file(folder) and not os.path.isdir(folder) and files.exists(folder):
        return folder
    names = files.list_names(folder)
    if META in names or is_export(names):
        return folder
    if CHECKPOINTS in names:
        return _newest_of(folder, files.join(folder, CHECKPOINTS))
    if any(_STEP_NAME.fullmatch(name) for name in names):
        return _newest_of(folder, folder)
    if _STEP_NAME.fullmatch(Path(folder).name) and names:
        raise CheckpointError(f"{folder} is incomplete: it has no meta.json, which is written last. {advise(folder)}")
    if not files.exists(folder):
        kind = "file" if is_weights_file(folder) else "folder"
        raise CheckpointError(f"No checkpoint at {folder}: there is no such {kind}. {advise(folder)}")
    found = ", ".join(names[:8]) or "nothing"
    raise CheckpointError(f"{folder} is not a checkpoint: it holds {found}. {_KINDS}")


def _newest_of(run: str, checkpoints: str) -> str:
    """Return the checkpoint in `latest` if it is complete, else the newest complete one."""
    names = files.list_names(checkpoints)
    if LATEST in names:
        latest = files.join(checkpoints, files.read_text(files.join(checkpoints, LATEST)).strip())
        if is_complete(latest):
            return latest
    newest = next(complete_checkpoints(checkpoints), None)
    if newest is None:
        raise CheckpointError(
            f"{run} has no complete checkpoint (a folder step-00001234 with a meta.json). "
            "Let the run reach its first checkpoint, or give another run."
        )
    return newest


def step_names(checkpoints: str) -> list[str]:
    """Return the names of all checkpoints, complete or not, oldest first."""
    return [name for name in files.list_names(checkpoints) if _STEP_NAME.fullmatch(name)]


def complete_checkpoints(checkpoints: str) -> Iterator[str]:
    """Yield the folders of complete checkpoints, newest first."""
    for name in reversed(step_names(checkpoints)):
        if is_complete(files.join(checkpoints, name)):
            yield files.join(checkpoints, name)


def advise(checkpoint: str) -> str:
    """Suggest a checkpoint to use in place of one that cannot be read."""
    parent, _, name = checkpoint.rpartition("/")
    good = next((other for other in complete_checkpoints(parent) if not other.endswith(f"/{name}")), None)
    if good is not None:
        return f"Use the last complete checkpoint of this run: {good}."
    return _KINDS


class DamagedError(CheckpointError):
    """The content of a checkpoint differs from what was written."""


def read_meta(checkpoint: PathLike) -> Meta:
    """Read a checkpoint's meta.json.

    Raises:
        CheckpointError: As `resolve_checkpoint`; or the checkpoint is an export, its meta.json is damaged, or its
            format is unknown to this version.
    """
    folder = resolve_checkpoint(checkpoint)
    path = files.join(folder, META)
    if not files.exists(path):
        raise CheckpointError(f"{folder} is an exported encoder, which has no meta.json. Give a run's checkpoint.")
    try:
        content = json.loads(files.read_text(path))
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}). {advise(folder)}") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}; this version of dora_ray reads format {FORMAT}. {advise(folder)} "
            "Or install the version that wrote it."
        )
    try:
        return Meta(**{name: content[name] for name in Meta.__dataclass_fields__})
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. {advise(folder)}") from error


def newest_meta(checkpoints: str) -> tuple[str, Meta] | None:
    """Return the newest complete checkpoint with a readable meta.json, and its meta; None without one."""
    for folder in complete_checkpoints(checkpoints):
        with suppress(DamagedError):
            return folder, read_meta(folder)
    return None


def write_checkpoint(checkpoints: str, name: str, contents: Mapping[str, bytes], meta: Mapping[str, Any]) -> str:
    """Write a checkpoint and make it the newest; first remove leftovers of a killed writer under this name.

    Args:
        checkpoints: The run's folder of checkpoints.
        name: Name of the checkpoint's folder.
        contents: Its files, except meta.json.
        meta: The fields of `Meta`, except `files`.

    Returns:
        The checkpoint's folder.
    """
    folder = files.join(checkpoints, name)
    files.remove(folder)
    files.make_folder(folder)
    for file, content in contents.items():
        files.write_bytes(files.join(folder, file), content)
    digests = {file: _digest(content) for file, content in contents.items()}
    files.write_text(files.join(folder, META), json.dumps({"format": FORMAT, **meta, "files": digests}, indent=1))
    files.write_text(files.join(checkpoints, LATEST), name + "\n")
    return folder


def _digest(content: bytes) -> str:
    # The standard library's fastest hash on CPUs with SHA instructions: half of blake2b's time.
    return hashlib.sha256(content).hexdigest()


def read_checked(folder: str, name: str, meta: Meta) -> bytes:
    """Read a file of a checkpoint and verify its digest.

    Raises:
        DamagedError: the file is missing, or its content has changed.
    """
    path = files.join(folder, name)
    try:
        content = files.read_bytes(path)
    except FileNotFoundError as error:
        raise DamagedError(f"{folder} has no {name}.") from error
    if _digest(content) != meta.files[name]:
        raise DamagedError(f"{path} is damaged: its {len(content)} bytes do not match the digest.")
    return content


def prune(checkpoints: str, *, keep: int) -> None:
    """Remove all but the `keep` newest complete checkpoints, and leftovers of failed writers."""
    complete = itertools.islice(complete_checkpoints(checkpoints), keep)
    kept = {path.rsplit("/", 1)[-1] for path in complete}
    for name in step_names(checkpoints):
        if name not in kept:
            files.remove(files.join(checkpoints, name))


def set_newest(checkpoints: str, kept: str | None) -> None:
    """Make `kept` (None: no checkpoint) the newest: point `latest` to it and move newer folders out of the way.

    A writer killed before it updates `latest` leaves it at the previous checkpoint. Newer incomplete folders are
    removed; newer complete ones, which are damaged, are renamed.
    """
    name = kept.rstrip("/").rsplit("/", 1)[-1] if kept is not None else ""
    newer = [other for other in step_names(checkpoints) if other > name]
    for other in newer:
        folder = files.join(checkpoints, other)
        if is_complete(folder):
            files.remove(files.join(checkpoints, DAMAGED + other))
            files.move(folder, files.join(checkpoints, DAMAGED + other))
        else:
            files.remove(folder)
    latest = files.join(checkpoints, LATEST)
    if not name:
        files.remove(latest)
    elif not files.exists(latest) or files.read_text(latest).strip() != name:
        files.write_text(latest, name + "\n")
