"""Load encoders from elsewhere: weights files of the released DoRA, DINO and compatible code, and timm models.

A file (.pth, .pt, .bin: a pickle, read without running code; or .safetensors) holds one of

    {"teacher": {...}, "student": {...}, ...}   a training checkpoint, of which the teacher is loaded
    {"state_dict": {...}} or {"model": {...}}   one network
    {...}                                       one network

whose tensors are named backbone.* and head.*, or as in the encoder, optionally after `module.` or `_orig_mod.`.
Tensors that are missing, unknown or of another shape are errors: an encoder without some of them would still produce
features, but useless ones.
"""

from __future__ import annotations

import argparse
import difflib
import io
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import safetensors
import safetensors.torch

from dora_ray import files
from dora_ray.checkpoints import TIMM
from dora_ray.config_network import ARCHITECTURES
from dora_ray.errors import CheckpointError
from dora_ray.imagenet import IMAGENET_MEAN, IMAGENET_STD
from dora_ray.timm_folder import input_facts, state_inputs

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
# Width of an attention head in all published ViTs; a weights file does not store the number of heads.
HEAD_WIDTH = 64
# Names of the projection head's tensors in both of torch's weight-norm implementations -> our names.
_HEAD_NAMES = {
    "mlp.weight": "mlp.0.weight",
    "mlp.bias": "mlp.0.bias",
    "last_layer.weight_g": "last_layer.gain",
    "last_layer.weight_v": "last_layer.direction",
    "last_layer.parametrizations.weight.original0": "last_layer.gain",
    "last_layer.parametrizations.weight.original1": "last_layer.direction",
}
SHOWN_NAMES = 6


@dataclass(frozen=True)
class Published:
    """Content of a weights file.

    Attributes:
        arguments: keyword arguments of `build_vit`, derived from the tensors' shapes.
        backbone: the encoder's tensors.
        head: the projection head's tensors, under the names of `DINOHead`; empty if the file has none.
    """

    arguments: dict[str, Any]
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]


def read_published(path: str) -> Published:
    """Read a weights file.

    Raises:
        CheckpointError: the file is damaged, would run code when loaded, or holds no plain ViT.
    """
    content = _load_tensors(path) if path.endswith(".safetensors") else _unpickle(path)
    tensors = _network(content, path)
    if not any(name.startswith("backbone.") for name in tensors):
        return Published(_arguments(tensors, path), tensors, {})
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "head": {}}
    unknown = [name for name in tensors if name.partition(".")[0] not in parts]
    if unknown:
        raise CheckpointError(f"{path} has tensors other than backbone.* and head.*: {shown(unknown)}.")
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][_HEAD_NAMES.get(rest, rest) if part == "head" else rest] = tensor
    return Published(_arguments(parts["backbone"], path), parts["backbone"], parts["head"])


def shown(names: list[str]) -> str:
    """Join the first few names, and add the number of the others."""
    rest = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + rest


def _load_tensors(path: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(files.read_bytes(path))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}). Fetch it again.") from error


def _unpickle(path: str) -> Any:
    """Load a pickle of tensors and plain values; an argparse Namespace (the writer's options) is allowed too."""
    import torch

    source = io.BytesIO(files.read_bytes(path)) if files.is_remote(path) else path
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise CheckpointError(f"{path} is not a weights file, or is damaged. Fetch it again.") from error
        raise CheckpointError(
            f"{path} would run code when loaded ({wanted[1]}), so it was not loaded. If you trust its author, keep "
            "only the tensors: "
            f"torch.save(torch.load({path!r}, weights_only=False)['teacher'], 'teacher.pth')"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or cut off ({said}). Fetch it again.") from error


def _network(content: Any, path: str) -> dict[str, Tensor]:
    """Return the tensors of the teacher or the only network, without prefixes of wrappers.

    Raises:
        CheckpointError: there is no network, or it holds something other than finite tensors.
    """
    import torch

    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a mapping of names to tensors.")
    if "student" in content and "teacher" not in content:
        raise CheckpointError(f"{path} has a student but no teacher, which is the network to load.")
    wrapper = next((key for key in ("teacher", "state_dict", "model") if isinstance(content.get(key), Mapping)), None)
    network = content if wrapper is None else content[wrapper]
    other = [str(name) for name, value in network.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise CheckpointError(f"{path} holds no network: {shown(other)} {'are' if len(other) > 1 else 'is'} no tensor.")
    tensors = {_WRAPPERS.sub("", str(name)): value for name, value in network.items()}
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} has values that are not finite in {shown(broken)}.")
    return tensors


def _arguments(tensors: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Derive an encoder's sizes from its tensors' shapes.

    Raises:
        CheckpointError: it is not a ViT, or its heads or patch grid cannot be derived.
    """
    projection, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if projection is None or positions is None or projection.ndim != 4 or positions.ndim != 3:
        raise CheckpointError(
            f"{path} holds no ViT: expected patch_embed.proj.weight (D, 3, P, P) and pos_embed (1, 1 + N, D), found "
            f"{shown(sorted(tensors))}."
        )
    width, patch_size = int(projection.shape[0]), int(projection.shape[-1])
    grid = math.isqrt(positions.shape[1] - 1)
    if grid**2 != positions.shape[1] - 1:
        raise CheckpointError(
            f"{path} has a position embedding of {positions.shape[1]} tokens; expected 1 for CLS and a square number "
            "of patches."
        )
    if width % HEAD_WIDTH:
        raise CheckpointError(
            f"{path} holds a ViT of width {width}, which is not a multiple of {HEAD_WIDTH}, the head width of all "
            "published ViTs; the tensors do not tell the number of heads."
        )
    depth = len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
    sizes = {"width": width, "depth": depth, "num_heads": width // HEAD_WIDTH, "patch_size": patch_size}
    name = next((name for name, known in ARCHITECTURES.items() if known == sizes), "vit_small_patch16_224")
    return {"name": name, **sizes, "image_size": grid * patch_size, "drop_path": 0.0}


def load_timm(source: str, *, pretrained: bool = True) -> VisionTransformer:
    """Build a timm model (timm:NAME), with its published weights or without.

    Like all encoders here it takes images normalized with ImageNet's mean and standard deviation; if the model was
    trained with others, the difference is folded into its patch embedding.

    Raises:
        CheckpointError: timm does not know the model or cannot fetch it, or it is not a plain ViT.
    """
    import timm

    from dora_ray.method.vit import is_plain

    name = source.removeprefix(TIMM)
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models("vit*", pretrained=True), n=3)
        raise CheckpointError(f"timm has no model {name!r}. Near: {', '.join(close) or 'vit_small_patch16_224.dino'}.")
    try:
        vit = timm.create_model(
            name, pretrained=pretrained, num_classes=0, global_pool="token", dynamic_img_size=True
        ).eval()
    except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{source} cannot be loaded ({type(error).__name__}: {said}). It must be a ViT with weights that timm can "
            "fetch here, such as timm:vit_small_patch16_224.dino."
        ) from error
    if not is_plain(vit):
        raise CheckpointError(
            f"{source} is not a plain ViT with a CLS token. Use one such as vit_small_patch16_224.dino."
        )
    own = input_facts(vit)
    fold_normalization(vit, mean=own["mean"], std=own["std"])
    state_inputs(vit, architecture=own["architecture"])
    return vit


def fold_normalization(vit: torch.nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Convert an encoder of images normalized with `mean` and `std` to ImageNet's normalization.

    For pixels p it expects x = (p - mean) / std per channel but gets y = (p - m) / s. Then x = (s y + m - mean) / std
    is affine in y, so the patch embedding, linear in x, can absorb the change.

    Raises:
        CheckpointError: the patch embedding has no bias.
    """
    import torch

    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return
    projection = cast(Any, vit).patch_embed.proj
    if projection.bias is None:
        raise CheckpointError(
            f"The encoder expects images normalized with mean {tuple(mean)}, not ImageNet's {IMAGENET_MEAN}, and its "
            "patch embedding has no bias to absorb the difference. Use another encoder."
        )
    with torch.no_grad():
        theirs = [torch.tensor(values, dtype=torch.float64) for values in (mean, std)]
        ours = [torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD)]
        weight = projection.weight.double()
        offset = torch.einsum("dchw,c->d", weight, (ours[0] - theirs[0]) / theirs[1])
        projection.weight.copy_(weight * (ours[1] / theirs[1])[:, None, None])
        projection.bias.copy_(projection.bias.double() + offset)
