"""From a training's checkpoint to an encoder that anything can use: find, check, load and export it.

A checkpoint is a folder of three files, meta.json being written last:

    step-00001234/
        model.safetensors   student.backbone.*  student.head.*  teacher.backbone.*  teacher.head.*
        state.pt            optimizer, center and schedules; nothing here reads it
        meta.json           format, step, configuration, plan, versions

Everything below also takes a run's folder (its newest checkpoint), and what needs only the encoder takes the folder
that `export` wrote. All folders may live behind a URI such as s3://. What is evaluated and exported is the teacher
(equation 7).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors
import safetensors.torch

from dora_ray import files
from dora_ray.errors import CheckpointError, ConfigError
from dora_ray.timm_folder import MODEL_FILE, build_from_timm_config, is_timm_folder, read_timm_config, save_timm_folder

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor, nn


FORMAT = 3
_STEP_NAME = re.compile(r"step-\d+")
PathLike = str | os.PathLike[str]
Module = TypeVar("Module", bound="nn.Module")


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself.

    Attributes:
        step: Optimizer steps done.
        config: The run's configuration, as `Config.model_dump(mode="json")` gave it.
        plan: The parts of the configuration and of the videos' index that shape the slots' content.
        plan_digest: Hash of `plan`; a resume with another one is refused.
        world_size: Number of train workers that wrote the checkpoint.
        bad_clips: Clips that could not be decoded and got weight 0.
        versions: Versions of the packages that wrote it.
        files: Hash of the content of each of the other files.
    """

    step: int
    config: dict[str, Any]
    plan: dict[str, Any]
    plan_digest: str
    world_size: int
    bad_clips: list[Any]
    versions: dict[str, str]
    files: dict[str, str]


def resolve_checkpoint(path: PathLike) -> str:
    """The folder that `path` means: itself (a checkpoint or an export), or the newest complete checkpoint of a run.

    Raises:
        CheckpointError: Nothing is there, or it is no checkpoint, run or export, or it holds no complete checkpoint.
    """
    folder = files.absolute(path)
    names = files.list_names(folder)
    if "meta.json" in names or is_timm_folder(names):
        return folder
    if "checkpoints" in names:
        return _newest_of(folder, files.join(folder, "checkpoints"))
    if any(_STEP_NAME.fullmatch(name) for name in names):
        return _newest_of(folder, folder)
    if _STEP_NAME.fullmatch(Path(folder).name) and names:
        raise CheckpointError(f"{folder} is incomplete: it has no meta.json, which is written last. {_advise(folder)}")
    if not files.exists(folder):
        raise CheckpointError(f"No checkpoint at {folder}: there is no such folder. {_advise(folder)}")
    found = ", ".join(names[:8]) or "nothing"
    raise CheckpointError(
        f"{folder} is not a checkpoint: it holds {found}. Give a checkpoint (step-00001234), a run's folder, "
        "or a folder that `dora-ray export` wrote."
    )


def _newest_of(run: str, checkpoints: str) -> str:
    """The complete checkpoint that `latest` names, else the newest complete one."""
    names = files.list_names(checkpoints)
    if "latest" in names:
        latest = files.join(checkpoints, files.read_text(files.join(checkpoints, "latest")).strip())
        if files.exists(files.join(latest, "meta.json")):
            return latest
    newest = next(complete_checkpoints(checkpoints), None)
    if newest is None:
        raise CheckpointError(
            f"{run} has no complete checkpoint (a folder step-00001234 with a meta.json). "
            "Let the run reach its first checkpoint, or give another run."
        )
    return newest


def step_names(checkpoints: str) -> list[str]:
    """Names of all checkpoints in a run's folder of checkpoints, complete or not, oldest first."""
    return [name for name in files.list_names(checkpoints) if _STEP_NAME.fullmatch(name)]


def complete_checkpoints(checkpoints: str) -> Iterator[str]:
    """Folders of the complete checkpoints in a run's folder of checkpoints, newest first."""
    for name in reversed(step_names(checkpoints)):
        if files.exists(files.join(checkpoints, name, "meta.json")):
            yield files.join(checkpoints, name)


def _advise(checkpoint: str) -> str:
    """What to use in place of a checkpoint that cannot be read."""
    parent, _, name = checkpoint.rpartition("/")
    good = next((other for other in complete_checkpoints(parent) if not other.endswith(f"/{name}")), None)
    if good is not None:
        return f"The last complete checkpoint beside it is {good}: use that one."
    return "Give a checkpoint (step-00001234), a run's folder, or a folder that `dora-ray export` wrote."


class DamagedError(CheckpointError):
    """The content of a checkpoint is not what was written."""


def read_meta(checkpoint: PathLike) -> Meta:
    """What the checkpoint says about itself.

    Raises:
        CheckpointError: As `resolve_checkpoint`; and an export, a damaged meta.json, or a format that this version
            does not know.
    """
    folder = resolve_checkpoint(checkpoint)
    path = files.join(folder, "meta.json")
    if not files.exists(path):
        raise CheckpointError(f"{folder} is an exported encoder, which has no meta.json. Give the run's checkpoint.")
    try:
        content = json.loads(files.read_text(path))
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged ({error!r}). {_advise(folder)}") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}; this version of dora_ray reads format {FORMAT}. {_advise(folder)} "
            "Or install the version that wrote it."
        )
    try:
        return Meta(**{name: content[name] for name in Meta.__dataclass_fields__})
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. {_advise(folder)}") from error


def load_backbone(checkpoint: PathLike) -> VisionTransformer:
    """The teacher's encoder, as a timm VisionTransformer in evaluation mode on the CPU.

    Args:
        checkpoint: A checkpoint, a run's folder, or a folder that `export` wrote; local or a URI.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, or of another architecture than its configuration says.
    """
    folder = resolve_checkpoint(checkpoint)
    if not files.exists(files.join(folder, "meta.json")):
        return _load_exported(folder)
    config = read_meta(folder).config
    return _fill(_build_vit(config), folder, prefix="teacher.backbone.", expected=describe_architecture(config))


def random_backbone(checkpoint: PathLike, *, seed: int) -> VisionTransformer:
    """An encoder of the checkpoint's architecture with newly drawn weights: what an evaluation compares with."""
    import torch

    folder = resolve_checkpoint(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if files.exists(files.join(folder, "meta.json")):
            return _build_vit(read_meta(folder).config).eval()
        return build_from_timm_config(read_timm_config(folder)).eval()


def vit_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `build_vit`, from a dumped configuration."""
    model = config["model"]
    names = ("name", "width", "depth", "num_heads", "patch_size", "drop_path")
    return {name: model[name] for name in names} | {"image_size": config["crops"]["global_size"]}


def network_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `build_network`, from a dumped configuration."""
    head = config["head"]
    names = ("hidden_width", "bottleneck_width", "num_layers", "num_outputs")
    return vit_arguments(config) | {name: head[name] for name in names}


def describe_architecture(config: dict[str, Any]) -> str:
    """One line that says which encoder a dumped configuration builds."""
    model = config["model"]
    return (
        f"{model['name']}, {model['width']} wide, {model['depth']} deep, {model['num_heads']} heads, "
        f"patch {model['patch_size']}, images of {config['crops']['global_size']} px"
    )


def require_architecture(checkpoint: PathLike, config: dict[str, Any]) -> None:
    """Refuse a checkpoint whose networks are not those that the dumped configuration `config` builds.

    Raises:
        CheckpointError: Naming both architectures.
    """
    saved = read_meta(checkpoint).config
    ours, theirs = network_arguments(config), network_arguments(saved)
    other = [name for name in ours if name != "drop_path" and ours[name] != theirs[name]]
    if other:
        differences = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in other)
        raise CheckpointError(
            f"{files.absolute(checkpoint)} holds another architecture ({describe_architecture(saved)}) than the "
            f"configuration asks for ({describe_architecture(config)}); different: {differences}. "
            "Give the configuration that the checkpoint was trained with, or start a new run."
        )


def _build_vit(config: dict[str, Any]) -> VisionTransformer:
    from dora_ray.method.vit import build_vit

    return build_vit(**vit_arguments(config))


def _read_tensors(folder: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of model.safetensors whose names begin with `prefix`, without it."""
    path = files.join(folder, MODEL_FILE)
    try:
        if files.is_remote(path):
            tensors = safetensors.torch.load(files.read_bytes(path))
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in list(file.keys())
                if name.startswith(prefix)
            }
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {MODEL_FILE}. {_advise(folder)}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}). {_advise(folder)}") from error


def _fill(module: Module, folder: str, *, prefix: str, expected: str) -> Module:
    """Put the saved tensors into a newly built module, which must have exactly their names and shapes."""
    saved = _read_tensors(folder, prefix)
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & saved.keys() if wanted[name].shape != saved[name].shape)
    if missing or unknown or reshaped:
        raise CheckpointError(
            f"{files.join(folder, MODEL_FILE)} holds another architecture ({_describe_tensors(saved)}) than its "
            f"configuration names ({expected}): {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape, first {(reshaped + missing + unknown)[0]}. {_advise(folder)}"
        )
    module.load_state_dict(saved)
    return module.eval()


def _describe_tensors(tensors: dict[str, Tensor]) -> str:
    """What the shapes of an encoder's tensors tell of it (the number of heads leaves no trace in them)."""
    projection = next((tensors[name] for name in tensors if name.endswith("patch_embed.proj.weight")), None)
    if projection is None:
        return "no ViT" if tensors else "no tensors under the expected names"
    blocks = {match[1] for name in tensors if (match := re.search(r"blocks\.(\d+)\.", name))}
    return f"a ViT {projection.shape[0]} wide, {len(blocks)} deep, patch {projection.shape[-1]}"


def export(checkpoint: PathLike, out: PathLike) -> Path:
    """Write the teacher's encoder as a timm model folder: model.safetensors, config.json and a README.md.

    `timm.create_model("local-dir:OUT", pretrained=True)` reloads it bit for bit, and so does `load_backbone`.

    Args:
        checkpoint: A checkpoint or a run's folder; local or a URI.
        out: A local folder, new or empty.

    Returns:
        The folder.

    Raises:
        ConfigError: `out` is not empty, or not local.
        CheckpointError: As `load_backbone`.
    """
    if files.is_remote(out):
        raise ConfigError(f"export writes to a local folder, not to {out}. Export locally, then copy the folder.")
    target = Path(files.absolute(out))
    if target.is_file() or files.list_names(target):
        raise ConfigError(f"{target} exists and is not empty. Give a new or an empty folder.")
    meta = read_meta(checkpoint)
    backbone = load_backbone(checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A neighbor that is renamed when complete: an interrupted export leaves no half folder under the asked name.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial.chmod(0o755)
        config = meta.config
        description = describe_architecture(config)
        save_timm_folder(backbone, partial, arguments=vit_arguments(config), description=description, step=meta.step)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _load_exported(folder: str) -> VisionTransformer:
    config = read_timm_config(folder)
    expected = f"{config['architecture']}, {config['model_args']}"
    return _fill(build_from_timm_config(config), folder, prefix="", expected=expected)
