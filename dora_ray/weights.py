"""Load, check and export encoders from training checkpoints or from weights from elsewhere.

All functions take a checkpoint or a run's folder (its newest checkpoint) and, if only the encoder is needed, an
exported folder, a weights file (.pth) or timm:NAME; all may be local or URIs such as s3://. The encoder is the
teacher's (equation 7). Every encoder takes images normalized with ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors
import safetensors.torch

from dora_ray import files
from dora_ray.checkpoints import (
    MODEL,
    TIMM,
    PathLike,
    advise,
    is_complete,
    is_weights_file,
    read_meta,
    resolve_checkpoint,
)
from dora_ray.errors import CheckpointError, ConfigError
from dora_ray.published import load_timm, read_published, shown
from dora_ray.timm_folder import (
    build_from_timm_config,
    describe,
    image_size,
    input_facts,
    read_timm_config,
    save_timm_folder,
    sizes,
    state_inputs,
)

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor, nn


Module = TypeVar("Module", bound="nn.Module")


def load_backbone(checkpoint: PathLike) -> VisionTransformer:
    """Return the teacher's encoder, as a timm VisionTransformer in evaluation mode on the CPU.

    Its `pretrained_cfg` describes its actual inputs: ImageNet's mean and standard deviation, and the training size.

    Args:
        checkpoint: A checkpoint, a run's folder, a folder written by `export`, or a weights file of the released DoRA
            or DINO (.pth), each local or a URI; or timm:NAME.

    Raises:
        CheckpointError: It is missing, incomplete or damaged, or its tensors do not match its configuration.
    """
    source = resolve_checkpoint(checkpoint)
    if source.startswith(TIMM):
        return load_timm(source)
    if is_weights_file(source):
        return _load_published(source)
    if not is_complete(source):
        config = read_timm_config(source)
        expected = f"{config['architecture']}, {config['model_args']}"
        return _fill(build_from_timm_config(config), source, prefix="", expected=expected)
    config = read_meta(source).config
    return _fill(_build_vit(config), source, prefix="teacher.backbone.", expected=describe_architecture(config))


def load_head(checkpoint: PathLike) -> dict[str, Tensor]:
    """Return the tensors of the teacher's projection head, under `DINOHead`'s names; empty if there is no head."""
    source = resolve_checkpoint(checkpoint)
    if source.startswith(TIMM):
        return {}
    if is_weights_file(source):
        return read_published(source).head
    return _read_tensors(source, "teacher.head.") if is_complete(source) else {}


def random_backbone(checkpoint: PathLike, *, seed: int) -> VisionTransformer:
    """Return an encoder of the checkpoint's architecture with random weights, as a baseline for evaluations."""
    import torch

    source = resolve_checkpoint(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source.startswith(TIMM):
            return load_timm(source, pretrained=False)
        if is_weights_file(source):
            return _build(read_published(source).arguments).eval()
        if is_complete(source):
            return _build_vit(read_meta(source).config).eval()
        return build_from_timm_config(read_timm_config(source)).eval()


@dataclass(frozen=True)
class Origin:
    """Origin of an encoder.

    Attributes:
        config: dumped configuration: the run's; for an encoder without one, the recipe `released` with its sizes.
        words: "the teacher after 7 steps", or the name of the loaded file or model.
        is_run: True for a checkpoint of a training.
    """

    config: dict[str, Any]
    words: str
    is_run: bool


def read_origin(checkpoint: PathLike, vit: VisionTransformer) -> Origin:
    """Return the origin of an encoder that was loaded by `load_backbone`."""
    from dora_ray.config import load_config

    source = resolve_checkpoint(checkpoint)
    if not (source.startswith(TIMM) or is_weights_file(source)) and is_complete(source):
        meta = read_meta(source)
        return Origin(meta.config, f"the teacher after {meta.step} steps", is_run=True)
    config = load_config("released").model_dump(mode="json")
    config["model"] |= {**sizes(vit), "name": input_facts(vit)["architecture"]}
    config["crops"]["global_size"] = image_size(vit)
    config["tracking"]["num_objects"] = min(config["tracking"]["num_objects"], config["model"]["num_heads"])
    return Origin(config, source.rsplit("/", 1)[-1], is_run=False)


def vit_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `build_vit` from a dumped configuration."""
    model = config["model"]
    names = ("name", "width", "depth", "num_heads", "patch_size", "drop_path")
    arguments = {name: model[name] for name in names} | {"image_size": config["crops"]["global_size"]}
    # Older checkpoints lack this setting.
    return arguments | {"position_interpolation": model.get("position_interpolation", "antialiased")}


def network_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `build_network` from a dumped configuration."""
    head = config["head"]
    names = ("hidden_width", "bottleneck_width", "num_layers", "num_outputs")
    return vit_arguments(config) | {name: head[name] for name in names}


def initial_values(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `build_network` that affect only initial weights."""
    return {
        "cls_token_std": config["model"]["cls_token_std"],
        "last_layer_init": config["head"]["last_layer_init"],
    }


def describe_architecture(config: dict[str, Any]) -> str:
    """Describe in one line the encoder of a dumped configuration."""
    model = config["model"]
    return (
        f"{model['name']}, {model['width']} wide, {model['depth']} deep, {model['num_heads']} heads, "
        f"patch {model['patch_size']}, images of {config['crops']['global_size']} px"
    )


def require_architecture(checkpoint: PathLike, config: dict[str, Any]) -> None:
    """Refuse a checkpoint whose networks do not match the dumped configuration `config`.

    Raises:
        CheckpointError: The architectures differ; the message names both.
    """
    saved = read_meta(checkpoint).config
    ours, theirs = network_arguments(config), network_arguments(saved)
    free = ("drop_path", "position_interpolation")
    other = [name for name in ours if name not in free and ours[name] != theirs[name]]
    if other:
        differences = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in other)
        raise CheckpointError(
            f"{files.absolute(checkpoint)} holds another architecture ({describe_architecture(saved)}) than the "
            f"configuration ({describe_architecture(config)}); different: {differences}. "
            "Use the configuration that the checkpoint was trained with, or start a new run."
        )


def _build_vit(config: dict[str, Any]) -> VisionTransformer:
    return _build(vit_arguments(config))


def _build(arguments: dict[str, Any]) -> VisionTransformer:
    from dora_ray.method.vit import build_vit

    vit = build_vit(**arguments)
    state_inputs(vit, architecture=arguments["name"])
    return vit


def _load_published(path: str) -> VisionTransformer:
    """Build the encoder that matches a weights file, and load its tensors."""
    found = read_published(path)
    vit = _build(found.arguments)
    wrong = differences(vit.state_dict(), found.backbone)
    if wrong:
        raise CheckpointError(f"{path} does not match the encoder of its sizes ({describe(vit)}): {wrong}.")
    vit.load_state_dict(found.backbone)
    return vit.eval()


def _read_tensors(folder: str, prefix: str) -> dict[str, Tensor]:
    """Read the tensors of model.safetensors whose names start with `prefix`, and strip the prefix."""
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
    """Load the saved tensors into a new module, whose names and shapes must match exactly."""
    saved = _read_tensors(folder, prefix)
    wrong = differences(module.state_dict(), saved)
    if wrong:
        raise CheckpointError(
            f"{files.join(folder, MODEL)} holds another architecture ({_describe_tensors(saved)}) than its "
            f"configuration names ({expected}): {wrong}. {advise(folder)}"
        )
    module.load_state_dict(saved)
    return module.eval()


def differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """List the tensors that are missing, unknown or of another shape; empty if there are none."""
    common = wanted.keys() & found.keys()
    kinds = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(
            f"{name} {tuple(found[name].shape)} for {tuple(wanted[name].shape)}"
            for name in common
            if wanted[name].shape != found[name].shape
        ),
    }
    return "; ".join(f"{len(names)} {kind} ({shown(names)})" for kind, names in kinds.items() if names)


def _describe_tensors(tensors: dict[str, Tensor]) -> str:
    """Describe an encoder by its tensors' shapes, which do not tell the number of heads."""
    projection = next((tensors[name] for name in tensors if name.endswith("patch_embed.proj.weight")), None)
    if projection is None:
        return "no ViT" if tensors else "no tensors under the expected names"
    blocks = {match[1] for name in tensors if (match := re.search(r"blocks\.(\d+)\.", name))}
    return f"a ViT {projection.shape[0]} wide, {len(blocks)} deep, patch {projection.shape[-1]}"


def export(checkpoint: PathLike, out: PathLike) -> Path:
    """Write the teacher's encoder as a timm model folder: model.safetensors, config.json and a README.md.

    `timm.create_model("local-dir:OUT", pretrained=True)` and `load_backbone` reload it bit for bit.

    Args:
        checkpoint: Any checkpoint that `load_backbone` accepts.
        out: A new or empty local folder.

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
        raise ConfigError(f"{target} is not empty. Give a new or empty folder.")
    backbone = load_backbone(checkpoint)
    origin = read_origin(checkpoint, backbone)
    history = "trained with DoRA (Discover and tRAck, arXiv 2310.08584) on video without labels: "
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write to a temporary folder and rename it, so that an interrupted export leaves no partial folder behind.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        partial.chmod(0o755)
        words = history + origin.words if origin.is_run else f"with the weights of {origin.words}"
        save_timm_folder(backbone, partial, origin=words)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
