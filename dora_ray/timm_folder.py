"""Encoder as a timm model folder, which other programs can load from disk or from a model hub.

model.safetensors holds the weights under timm's names, config.json the model's arguments and image preprocessing,
README.md the model card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch

from dora_ray import files
from dora_ray.checkpoints import EXPORT_CONFIG, MODEL
from dora_ray.errors import CheckpointError
from dora_ray.imagenet import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn


def state_inputs(vit: nn.Module, *, architecture: str) -> None:
    """Set the model's `pretrained_cfg` to its actual image preprocessing, which differs from timm's default.

    `timm.data.resolve_model_data_config(vit)` then returns the training size and ImageNet's mean and standard
    deviation.
    """
    size = image_size(vit)
    facts = {
        "architecture": architecture,
        "tag": "dora",
        "custom_load": False,
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    vit.__dict__.update(pretrained_cfg=facts, default_cfg=facts)


def input_facts(vit: nn.Module) -> dict[str, Any]:
    """Return a timm model's image preprocessing, its `pretrained_cfg`."""
    return dict(cast(Any, vit).pretrained_cfg)


def image_size(vit: nn.Module) -> int:
    """Return the image size of the position embedding, in pixels."""
    return int(cast(Any, vit).patch_embed.img_size[0])


def sizes(vit: VisionTransformer) -> dict[str, int]:
    """Return width, depth, num_heads and patch_size of an encoder, under the configuration's names."""
    return {
        "width": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": cast(Any, vit.blocks[0]).attn.num_heads,
        "patch_size": int(cast(Any, vit).patch_embed.patch_size[0]),
    }


def describe(vit: VisionTransformer) -> str:
    """Return a one-line description of an encoder prepared by `state_inputs`."""
    known = sizes(vit)
    return (
        f"{input_facts(vit)['architecture']}, {known['width']} wide, {known['depth']} deep, {known['num_heads']} "
        f"heads, patch {known['patch_size']}, images of {image_size(vit)} px"
    )


def save_timm_folder(vit: VisionTransformer, folder: Path, *, origin: str) -> None:
    """Write the three files into an existing folder.

    Args:
        vit: An encoder prepared by `state_inputs`.
        folder: Target folder.
        origin: Origin of its weights, for the model card; continues "A Vision Transformer, ".
    """
    safetensors.torch.save_file(vit.state_dict(), folder / MODEL, metadata={"format": "pt"})
    (folder / EXPORT_CONFIG).write_text(json.dumps(_timm_config(vit), indent=2) + "\n")
    (folder / "README.md").write_text(_model_card(vit, origin))


def read_timm_config(folder: str) -> dict[str, Any]:
    """Read the folder's config.json.

    Raises:
        CheckpointError: It is not a timm configuration.
    """
    path = files.join(folder, EXPORT_CONFIG)
    try:
        config = json.loads(files.read_text(path))
        config["architecture"], config["model_args"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a timm configuration ({error!r}). Export the encoder again.") from error
    return dict(config)


def build_from_timm_config(config: dict[str, Any]) -> VisionTransformer:
    """Build a new encoder with the configuration's architecture.

    Raises:
        CheckpointError: timm cannot build it, or it is not a plain ViT.
    """
    import timm

    from dora_ray.method.vit import is_plain

    name = config["architecture"]
    try:
        vit = timm.create_model(name, pretrained=False, **config["model_args"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"timm cannot build the architecture {name!r} ({error}). Export it again.") from error
    if not is_plain(vit):
        raise CheckpointError(f"{name!r} is not a plain ViT with a CLS token.")
    state_inputs(vit, architecture=name)
    return vit


def _timm_config(vit: VisionTransformer) -> dict[str, Any]:
    """Return the arguments of the architecture's constructor, and the image preprocessing."""
    known = sizes(vit)
    return {
        "architecture": input_facts(vit)["architecture"],
        "num_classes": 0,
        "num_features": vit.num_features,
        "global_pool": "token",
        "model_args": {
            "embed_dim": known["width"],
            "depth": known["depth"],
            "num_heads": known["num_heads"],
            "patch_size": known["patch_size"],
            "img_size": image_size(vit),
            "dynamic_img_size": True,
            "num_classes": 0,
            "global_pool": "token",
        },
        "pretrained_cfg": {name: value for name, value in input_facts(vit).items() if name != "architecture"},
    }


def _model_card(vit: VisionTransformer, origin: str) -> str:
    num_parameters = sum(parameter.numel() for parameter in vit.parameters())
    size = image_size(vit)
    return f"""---
library_name: timm
tags: [image-feature-extraction, self-supervised, dora]
---
# An image encoder in dora_ray's form

A Vision Transformer ({describe(vit)}; {num_parameters / 1e6:.1f} M parameters), {origin}.
This card makes no claim about its quality: measure it with `dora-ray eval knn`.

```python
import timm, torch

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
features = model(torch.rand(1, 3, {size}, {size}))  # (1, {vit.num_features}): the CLS token after the final norm
```

Images: RGB in [0, 1], normalized with mean {IMAGENET_MEAN} and standard deviation {IMAGENET_STD}; made for
{size} px, and any size that is a multiple of the patch works.
"""
