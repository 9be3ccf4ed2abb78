"""The ten most important settings, in the order in which to decide on them, with their costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dora_ray.config import Config


class Setting(NamedTuple):
    """One setting of a configuration: keys, value, advice, cost."""

    keys: str
    value: str
    advice: str
    cost: str


def important(config: Config) -> list[Setting]:
    """Return the ten settings, most important first, with the costs for this configuration."""
    return [*_of_the_run(config), *_of_the_method(config)]


def _of_the_run(config: Config) -> list[Setting]:
    data, optim, cluster = config.data, config.optim, config.cluster
    batch = optim.slots * optim.clips_per_slot
    return [
        Setting(
            "data.videos",
            ", ".join(data.videos) or "none yet",
            "Hours of continuous walking; the variety of video matters more than any number below.",
            "each is decoded once; `dora-ray plan` with your videos estimates time and disk space",
        ),
        Setting(
            "optim.steps",
            f"{optim.steps:,}",
            "Try a tenth first: warm-up is a share of the run and scales with it.",
            f"proportional time: {optim.steps * batch:,} clips in total",
        ),
        Setting(
            "cluster.num_workers",
            str(cluster.num_workers),
            "One per GPU, or [fewest, most] if machines come and go; it does not change the result.",
            f"a GPU or {cluster.cpus_per_worker:g} CPUs each; at most optim.slots={optim.slots}",
        ),
        Setting(
            "optim.slots x optim.clips_per_slot",
            f"{optim.slots} x {optim.clips_per_slot}",
            "The batch is their product. Out of memory: fewer clips per slot and more slots keep the same batch.",
            f"{batch} clips per step; memory proportional to clips_per_slot alone",
        ),
        Setting(
            "optim.lr",
            f"{optim.lr:g}",
            f"Scale it with the batch ({optim.num_warmup_steps:,} warm-up steps); lower it if losses are not finite.",
            "no time; if too high, the teacher gives every image the same output",
        ),
    ]


def _of_the_method(config: Config) -> list[Setting]:
    model, clip, crops, tracking, data = config.model, config.clip, config.crops, config.tracking, config.data
    whole = clip.num_frames * (crops.global_size // model.patch_size) ** 2
    seen = _patches(config)
    total = sum(seen.values())
    return [
        Setting(
            "model.name",
            f"{model.name}, width {model.width}, depth {model.depth}",
            "The paper uses ViT-S; the recipe paper-vit-b needs four times the compute.",
            "time proportional to the depth and to the square of the width",
        ),
        Setting(
            "tracking.num_objects",
            str(tracking.num_objects),
            "The paper uses k = 3; at most the encoder's number of heads. sweeps/objects.yaml finds the best for you.",
            f"{seen['objects'] / total:.0%} of the patches that the networks see; each object adds {whole:,} per clip",
        ),
        Setting(
            "clip.num_frames, clip.stride_seconds",
            f"{clip.num_frames}, {clip.stride_seconds:g} s",
            "Number of frames to track objects through, and their distance; 2 frames are the cheapest.",
            "time and memory proportional to the frames",
        ),
        Setting(
            "crops.num_locals",
            str(crops.num_locals),
            "Small views are cheap, and help to prevent collapse.",
            f"{seen['locals'] / total:.0%} of the patches that the networks see",
        ),
        Setting(
            "data.frames_per_second, data.short_side",
            f"{data.frames_per_second:g}, {data.short_side} pixels",
            "Frames kept in the store; a change requires another ingest.",
            "disk proportional to the first and to the square of the second",
        ),
    ]


def _patches(config: Config) -> dict[str, int]:
    """Return a clip's patches seen by student and teacher, by kind of view; object views count in full."""
    crops, patch, frames = config.crops, config.model.patch_size, config.clip.num_frames
    whole = frames * (crops.global_size // patch) ** 2
    kinds: dict[str, Any] = {"globals": whole * config.num_globals}
    kinds["objects"] = 0 if config.tracking.kind == "none" else whole * config.tracking.num_objects
    kinds["locals"] = frames * crops.num_locals * (crops.local_size // patch) ** 2
    return kinds
