"""The settings of each evaluation protocol, with their defaults: what `evaluate(..., **options)` may be given.

They belong to a protocol (DINO's, where nothing else is said) and not to a run, so a run's configuration has none of
them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dora_ray.config_section import Count, Natural, Positive, Section, checked


class Options(Section):
    """Options of every task."""

    device: str = "cpu"
    """Where the encoder runs: cpu, cuda, cuda:1 or mps."""
    random_init: bool = False
    """Evaluate a newly drawn encoder of the checkpoint's architecture: the figure to compare with."""
    seed: Natural = 0
    """Seed of the newly drawn encoder."""


class FileOptions(Options):
    """Options of the tasks on many files."""

    skip_unreadable: bool = False
    """Leave out files that cannot be read, with a warning, in place of naming them in an error."""


class ImageOptions(FileOptions):
    """Options of the tasks on labeled images."""

    image_size: Count | None = None
    """Side of the square images, pixels; not set: what the encoder was trained on."""
    max_images: Count | None = None
    """Images of each part, evenly spaced over its list; not set: all."""
    batch_size: Count = 64
    """Images a forward pass."""
    num_workers: Count = 4
    """Threads that read images."""


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
    """Seed of the order of the probe's images."""


class CorlocOptions(FileOptions):
    """Object discovery: one box an image."""

    method: Literal["attention", "lost"] = "lost"
    """Rule that finds a box: mean CLS attention above its mean, or LOST."""
    short_side: Count | None = None
    """Short side of what the encoder sees, pixels; not set: the image's own (LOST), within `long_side`."""
    long_side: Count = 640
    """Where short_side is not set, the longest that the encoder sees, pixels: images of Pascal VOC have 500 at most."""
    num_seeds: Count = 100
    """Patches of lowest degree that may join the seed (LOST)."""
    max_images: Count | None = None
    """The first images of the list; not set: all."""


class VosOptions(FileOptions):
    """Video object segmentation by label propagation (DINO's values)."""

    year: Literal["2016", "2017"] | None = None
    """Whose list of sequences is used; 2016 scores all objects as one. Not set: the newest list that is there, or all
    sequences, and each object by itself."""
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


class BesideOptions(Options):
    """Options of the tasks that measure newly drawn encoders on the same clips."""

    image_size: Count | None = None
    """Side of what the encoder sees (the short one of whole frames), pixels; not set: what it was trained on."""
    random_encoders: Natural = 1
    """Newly drawn encoders that are measured too; 0 for none."""
    draw_seed: Natural = 0
    """Seed of all that the measure draws: heads, crops, light."""


class ObjectsOptions(BesideOptions):
    """The method's own object masks on clips whose objects are known. What is not set of tracking is as trained."""

    num_frames: Annotated[int, Field(ge=2)] = 4
    """Frames of a clip: objects are discovered in the first, and tracked through the others."""
    stride: Count = 1
    """Labeled frames from one frame of a clip to the next."""
    num_draws: Count = 4
    """Times that heads are drawn for each clip; its score is their mean."""
    max_clips: Count | None = None
    """Clips, evenly spaced over all; not set: all."""
    least_area: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Objects that cover less of a frame than this share are left out there."""
    num_objects: Count | None = None
    """Objects that are discovered (k)."""
    block: Annotated[int, Field(le=-1)] | None = None
    """Block whose features discover and track, from the end: -1 is the last."""
    normalize_patches: bool | None = None
    """L2-normalize the patch tokens."""
    num_iterations: Natural | None = None
    """Iterations of Sinkhorn-Knopp; 0 for none."""
    epsilon: Positive | None = None
    """Entropic regularization of Sinkhorn-Knopp."""
    threshold: Literal["clip", "batch"] | None = None
    """Rule of the masks."""


class ViewsOptions(BesideOptions):
    """Held-out view matching, on any video."""

    num_scenes: Annotated[int, Field(ge=4)] = 128
    """Scenes among which each is looked for, at most; fewer where the video is short."""
    gap_seconds: Positive = 0.5
    """From a scene to its later frame, in a video."""
    gap_frames: Count = 12
    """The same, in a folder of frames."""
    local_scale: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Side of the local crop, as a share of the frame's short side."""
    batch_size: Count = 64
    """Views a forward pass."""


TRACKING_OPTIONS = ("num_objects", "block", "normalize_patches", "num_iterations", "epsilon", "threshold")
OptionsType = type[Options]


def parse_options(kind: OptionsType, task: str, values: dict[str, Any]) -> Options:
    """Checked options of a task.

    Raises:
        ConfigError: An unknown option (all known ones are listed) or a value that is not allowed.
    """
    if isinstance(values.get("year"), int):  # as YAML reads year=2016
        values = values | {"year": str(values["year"])}
    return checked(kind, values, f"option of evaluation {task!r}:")
