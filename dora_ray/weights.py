"""From a training's checkpoint to an encoder that anything can use: check, load and export it.

Everything below takes a checkpoint, a run's folder (its newest checkpoint) and, where only the encoder is needed, the
folder that `export` wrote; local or behind a URI such as s3://. What is evaluated and exported is the teacher (equation
7).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors
import safetensors.torch

from dora_ray import files
from dora_ray.checkpoints import MODEL, PathLike, advise, is_complete, read_meta, resolve_checkpoint
from dora_ray.errors import CheckpointError, ConfigError
from dora_ray.timm_folder import build_from_timm_config, read_timm_config, save_timm_folder

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor, nn


Module = TypeVar("Module", bound="nn.Module")


def load_backbone(checkpoint: PathLike) -> VisionTransformer:
    """The teacher's encoder, as a timm VisionTransformer in evaluation mode on the CPU.

    Args:
        checkpoint: A checkpoint, a run's folder, or a folder that `export` wrote; local or a URI.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, or of another architecture than its configuration says.
    """
    folder = resolve_checkpoint(checkpoint)
    if not is_complete(folder):
        return _load_exported(folder)
    config = read_meta(folder).config
    return _fill(_build_vit(config), folder, prefix="teacher.backbone.", expected=describe_architecture(config))


def random_backbone(checkpoint: PathLike, *, seed: int) -> VisionTransformer:
    """An encoder of the checkpoint's architecture with newly drawn weights: what an evaluation compares with."""
    import torch

    folder = resolve_checkpoint(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_complete(folder):
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
    path = files.join(folder, MODEL)
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
        raise CheckpointError(f"{folder} has no {MODEL}. {advise(folder)}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}). {advise(folder)}") from error


def _fill(module: Module, folder: str, *, prefix: str, expected: str) -> Module:
    """Put the saved tensors into a newly built module, which must have exactly their names and shapes."""
    saved = _read_tensors(folder, prefix)
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & saved.keys() if wanted[name].shape != saved[name].shape)
    if missing or unknown or reshaped:
        raise CheckpointError(
            f"{files.join(folder, MODEL)} holds another architecture ({_describe_tensors(saved)}) than its "
            f"configuration names ({expected}): {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape, first {(reshaped + missing + unknown)[0]}. {advise(folder)}"
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
