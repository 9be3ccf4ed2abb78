"""Options of each evaluation protocol, with defaults; accepted by `evaluate(..., **options)`.

They belong to a protocol (DINO's unless stated otherwise), not to a run, so they are not part of its configuration.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dora_ray.config_section import Count, Natural, Positive, Section, checked


class Options(Section):
    """Options of every task."""

    device: str = "cpu"
    """Device of the encoder: cpu, cuda, cuda:1 or mps."""
    random_init: bool = False
    """Evaluate a random encoder of the checkpoint's architecture, as a baseline."""
    seed: Natural = 0
    """Seed of the random encoder."""


class FileOptions(Options):
    """Options of tasks that read many files."""

    skip_unreadable: bool = False
    """Skip files that cannot be read, with a warning, instead of raising an error that names them."""


class ImageOptions(FileOptions):
    """Options of tasks on labeled images."""

    image_size: Count | None = None
    """Side of the square images, pixels; default: the encoder's training size."""
    max_images: Count | None = None
    """Images per split, evenly spaced over its list; default: all."""
    batch_size: Count = 64
    """Images per forward pass."""
    num_workers: Count = 4
    """Threads that read images."""


class KnnOptions(ImageOptions):
    """Weighted nearest neighbors."""

    neighbors: Annotated[tuple[Count, ...], Field(min_length=1)] = (20, 10, 100, 200)
    """Values of k; the first gives the headline score. Values above the number of training images are lowered to it."""
    temperature: Positive = 0.07
    """Temperature of the votes: a neighbor's weight is exp(similarity / temperature)."""


class LinearOptions(ImageOptions):
    """A linear probe."""

    num_blocks: Count = 4
    """Number of last blocks whose CLS tokens form the feature (4 for ViT-S, 1 for ViT-B)."""
    epochs: Count = 100
    """Passes over the training features."""
    lr: Positive = 0.001
    """Learning rate for a batch of 256; the rate used is lr x probe_batch_size / 256."""
    probe_batch_size: Count = 256
    """Images per step of the probe."""
    probe_seed: Natural = 0
    """Seed of the order of the probe's images."""


class CorlocOptions(FileOptions):
    """Object discovery: one box per image."""

    method: Literal["attention", "lost"] = "lost"
    """Method to find a box: CLS attention (averaged over heads) above its mean, or LOST."""
    short_side: Count | None = None
    """Short side of the encoder's input, pixels; default: the image's own (LOST), limited by `long_side`."""
    long_side: Count = 640
    """Limit of the long side if short_side is not set, pixels; Pascal VOC's images have at most 500."""
    num_seeds: Count = 100
    """Number of patches of lowest degree that may join the seed (LOST)."""
    max_images: Count | None = None
    """Use only the first images of the list; default: all."""


class VosOptions(FileOptions):
    """Video object segmentation by label propagation (DINO's values)."""

    year: Literal["2016", "2017"] | None = None
    """Year of the list of sequences; 2016 scores all objects as one. Default: the newest list in the folder, or all
    sequences, scoring each object by itself."""
    short_side: Count = 480
    """Short side of the encoder's input, pixels."""
    num_frames: Count = 7
    """Number of previous frames, besides the first, that labels are propagated from."""
    radius: Natural = 12
    """Largest distance in rows and in columns that a label is propagated, patches."""
    num_neighbors: Count = 5
    """Number of patches that a label is averaged over."""
    temperature: Positive = 0.1
    """Temperature of the average: a patch's weight is exp(similarity / temperature)."""
    max_frames: Annotated[int, Field(ge=3)] | None = None
    """Frames of each sequence, from its start; default: all."""


class BesideOptions(Options):
    """Options of tasks that also evaluate random encoders on the same clips."""

    image_size: Count | None = None
    """Side of the encoder's input (short side for whole frames), pixels; default: the encoder's training size."""
    random_encoders: Natural = 1
    """Number of random encoders to evaluate for comparison; 0 for none."""
    draw_seed: Natural = 0
    """Seed of the measure's random draws: heads, crops, lighting."""


class ObjectsOptions(BesideOptions):
    """The method's own object masks on labeled clips. Tracking options default to the training's values."""

    num_frames: Annotated[int, Field(ge=2)] = 4
    """Frames per clip: objects are discovered in the first and tracked through the others."""
    stride: Count = 1
    """Step between the frames of a clip, in labeled frames."""
    num_draws: Count = 4
    """Number of draws of heads per clip; its score is the mean over them."""
    max_clips: Count | None = None
    """Number of clips, evenly spaced over all; default: all."""
    least_area: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Objects that cover less than this share of a frame are ignored in it."""
    num_objects: Count | None = None
    """Number of objects to discover (k)."""
    block: Annotated[int, Field(le=-1)] | None = None
    """Block whose features are used to discover and track, counted from the end: -1 is the last."""
    normalize_patches: bool | None = None
    """L2-normalize the patch tokens."""
    num_iterations: Natural | None = None
    """Iterations of Sinkhorn-Knopp; 0 for none."""
    epsilon: Positive | None = None
    """Entropic regularization of Sinkhorn-Knopp."""
    threshold: Literal["clip", "batch"] | None = None
    """Threshold rule of the masks."""


class ViewsOptions(BesideOptions):
    """Held-out view matching, on any video."""

    num_scenes: Annotated[int, Field(ge=4)] = 128
    """Maximum number of scenes; fewer if the video is short."""
    gap_seconds: Positive = 0.5
    """Time from a scene to its later frame, in a video."""
    gap_frames: Count = 12
    """Number of frames from a scene to its later frame, in a folder of frames."""
    local_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Side of the local crop, as a share of the frame's short side."""
    batch_size: Count = 64
    """Views per forward pass."""


TRACKING_OPTIONS = ("num_objects", "block", "normalize_patches", "num_iterations", "epsilon", "threshold")
OptionsType = type[Options]


def parse_options(kind: OptionsType, task: str, values: dict[str, Any]) -> Options:
    """Check the options of a task.

    Raises:
        ConfigError: An option is unknown (the message lists all), or a value is not allowed.
    """
    if isinstance(values.get("year"), int):  # as YAML reads year=2016
        values = values | {"year": str(values["year"])}
    return checked(kind, values, f"option of evaluation {task!r}:")
