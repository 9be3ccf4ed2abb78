"""An encoder as a timm model folder: what other programs load, on disk or after an upload to a model hub.

model.safetensors holds the weights under timm's names, config.json the arguments that rebuild the model and how images
are prepared for it, README.md the model card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch

from dora_ray import files
from dora_ray.checkpoints import EXPORT_CONFIG, MODEL
from dora_ray.errors import CheckpointError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def save_timm_folder(
    backbone: VisionTransformer, folder: Path, *, arguments: dict[str, Any], description: str, step: int
) -> None:
    """Write the three files into an existing folder.

    Args:
        backbone: The encoder.
        folder: Where to.
        arguments: The keyword arguments of `build_vit` that built it.
        description: One line about its architecture.
        step: Steps that it was trained for.
    """
    safetensors.torch.save_file(backbone.state_dict(), folder / MODEL, metadata={"format": "pt"})
    (folder / EXPORT_CONFIG).write_text(json.dumps(_timm_config(backbone, arguments), indent=2) + "\n")
    (folder / "README.md").write_text(_model_card(backbone, arguments["image_size"], description, step))


def read_timm_config(folder: str) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: It is none of timm's.
    """
    path = files.join(folder, EXPORT_CONFIG)
    try:
        config = json.loads(files.read_text(path))
        config["architecture"], config["model_args"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no timm configuration ({error!r}). Export the encoder again.") from error
    return dict(config)


def build_from_timm_config(config: dict[str, Any]) -> VisionTransformer:
    """A new encoder of the configuration's architecture."""
    import timm

    vit = timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
    return cast("VisionTransformer", vit)


def _timm_config(backbone: VisionTransformer, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `create_model` passes to the architecture's constructor, and how to prepare images."""
    size = arguments["image_size"]
    return {
        "architecture": arguments["name"],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "global_pool": "token",
        "model_args": {
            "embed_dim": arguments["width"],
            "depth": arguments["depth"],
            "num_heads": arguments["num_heads"],
            "patch_size": arguments["patch_size"],
            "img_size": size,
            "dynamic_img_size": True,
            "num_classes": 0,
            "global_pool": "token",
        },
        "pretrained_cfg": {
            "tag": "dora",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _model_card(backbone: VisionTransformer, size: int, description: str, step: int) -> str:
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return f"""---
library_name: timm
tags: [image-feature-extraction, self-supervised, dora]
---
# An image encoder trained with DoRA

A Vision Transformer ({description}; {num_parameters / 1e6:.1f} M parameters), the teacher of a
self-supervised training with DoRA (Discover and tRAck, arXiv 2310.08584) on video without labels, after {step}
steps. Nothing here says how good it is: measure it with `dora-ray eval knn`.

```python
import timm, torch

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
features = model(torch.rand(1, 3, {size}, {size}))  # (1, {backbone.num_features}): the CLS token after the final norm
```

Images: RGB in [0, 1], normalized with mean {IMAGENET_MEAN} and standard deviation {IMAGENET_STD}; trained at
{size} px, and any size that is a multiple of the patch works.
"""
