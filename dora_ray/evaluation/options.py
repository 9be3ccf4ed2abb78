"""The settings of each evaluation protocol, with their defaults: what `evaluate(..., **options)` may be given.

They belong to a protocol (DINO's, where nothing else is said) and not to a run, so a run's configuration has none of
them.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dora_ray.config import Count, Natural, Positive, Section
from dora_ray.errors import ConfigError


class Options(Section):
    """What every task takes."""

    device: str = "cpu"
    """Where the encoder runs: cpu, cuda, cuda:1 or mps."""
    random_init: bool = False
    """Evaluate a newly drawn encoder of the checkpoint's architecture: the figure to compare with."""
    seed: Natural = 0
    """Of the newly drawn encoder."""


class ImageOptions(Options):
    """What the tasks on labeled images take."""

    image_size: Count | None = None
    """Side of the square images, pixels; not set: what the encoder was trained on."""
    max_images: Count | None = None
    """Images of each part, evenly spaced over its list; not set: all."""
    batch_size: Count = 64
    """Images a forward pass."""
    num_workers: Count = 4
    """Threads that read images."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, with a warning, in place of stopping at the end."""


class KnnOptions(ImageOptions):
    """Weighted nearest neighbors."""

    neighbors: Annotated[tuple[Count, ...], Field(min_length=1)] = (20, 10, 100, 200)
    """Values of k, the headline first; those above the number of training images are lowered to it."""
    temperature: Positive = 0.07
    """A neighbor's vote weighs exp(similarity / temperature)."""


class LinearOptions(ImageOptions):
    """A linear probe."""

    num_blocks: Count = 4
    """Last blocks whose CLS tokens make the feature (4 for ViT-S, 1 for ViT-B)."""
    epochs: Count = 100
    """Passes over the training features."""
    lr: Positive = 0.001
    """Learning rate for 256 images a batch; the rate used is lr x probe_batch_size / 256."""
    probe_batch_size: Count = 256
    """Images a step of the probe."""
    probe_seed: Natural = 0
    """Of the order of the probe's images."""


class CorlocOptions(Options):
    """Object discovery: one box an image."""

    method: Literal["attention", "lost"] = "lost"
    """How a box is found: mean CLS attention above its mean, or LOST."""
    short_side: Count | None = None
    """Short side of what the encoder sees, pixels; not set: the image's own (LOST)."""
    num_seeds: Count = 100
    """Patches of lowest degree that may join the seed (LOST)."""
    max_images: Count | None = None
    """The first images of the list; not set: all."""


class VosOptions(Options):
    """Video object segmentation by label propagation (DINO's values)."""

    short_side: Count = 480
    """Short side of the frames that the encoder sees, pixels."""
    num_frames: Count = 7
    """Earlier frames, beside the first, that labels come from."""
    radius: Natural = 12
    """Largest distance of rows and of columns between patches that share a label, patches."""
    num_neighbors: Count = 5
    """Patches that a label comes from."""
    temperature: Positive = 0.1
    """A patch's label weighs exp(similarity / temperature)."""
    max_frames: Annotated[int, Field(ge=3)] | None = None
    """Frames of each sequence, from its start; not set: all."""


OptionsType = type[Options]


def parse_options(kind: OptionsType, task: str, values: dict[str, Any]) -> Options:
    """Checked options of a task.

    Raises:
        ConfigError: An unknown option (all known ones are listed) or a value that is not allowed.
    """
    known = list(kind.model_fields)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"evaluation {task!r} has no option {name!r}; it has {', '.join(known)}.{hint}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        name = ".".join(str(part) for part in detail["loc"])
        raise ConfigError(f"evaluation option {name}={detail['input']!r}: {detail['msg']}.") from None
