"""The ten settings that matter most, in the order in which to decide on them, with what each costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dora_ray.config import Config


class Setting(NamedTuple):
    """One setting of a configuration: its keys, its value there, what to know, and what it costs."""

    keys: str
    value: str
    advice: str
    cost: str


def important(config: Config) -> list[Setting]:
    """Return the ten settings, most important first; costs are those of this configuration."""
    return [*_of_the_run(config), *_of_the_method(config)]


def _of_the_run(config: Config) -> list[Setting]:
    data, optim, cluster = config.data, config.optim, config.cluster
    batch = optim.slots * optim.clips_per_slot
    return [
        Setting(
            "data.videos",
            ", ".join(data.videos) or "none yet",
            "Hours of unbroken walking; variety of video matters more than any number below.",
            "each is decoded once; `dora-ray plan` with your videos says how long and how much disk",
        ),
        Setting(
            "optim.steps",
            f"{optim.steps:,}",
            "Try a tenth first: warm-up is a share of the run and follows.",
            f"time in proportion: {optim.steps * batch:,} clips in all",
        ),
        Setting(
            "cluster.num_workers",
            str(cluster.num_workers),
            "One for each GPU, or [fewest, most] where machines come and go; it never changes what is learnt.",
            f"a GPU or {cluster.cpus_per_worker:g} CPUs each; at most optim.slots={optim.slots}",
        ),
        Setting(
            "optim.slots x optim.clips_per_slot",
            f"{optim.slots} x {optim.clips_per_slot}",
            "The batch is their product. Out of memory: fewer clips a slot and more slots are the same batch.",
            f"{batch} clips a step; memory in proportion to clips_per_slot alone",
        ),
        Setting(
            "optim.lr",
            f"{optim.lr:g}",
            f"Scale it with the batch ({optim.num_warmup_steps:,} warm-up steps); lower it if losses are not finite.",
            "no time; too high, and the teacher gives every image the same output",
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
            "ViT-S is the paper's; the recipe paper-vit-b is four times the arithmetic.",
            "time in proportion to depth and to the square of the width",
        ),
        Setting(
            "tracking.num_objects",
            str(tracking.num_objects),
            "The paper's k: 3. More than the encoder's heads are refused; sweeps/objects.yaml asks for yours.",
            f"{seen['objects'] / total:.0%} of the patches that the networks see; each object adds {whole:,} a clip",
        ),
        Setting(
            "clip.num_frames, clip.stride_seconds",
            f"{clip.num_frames}, {clip.stride_seconds:g} s",
            "Objects are tracked through so many frames, so far apart; 2 frames are the cheapest.",
            "time and memory in proportion to the frames",
        ),
        Setting(
            "crops.num_locals",
            str(crops.num_locals),
            "Small views are cheap, and keep the teacher from giving every image the same output.",
            f"{seen['locals'] / total:.0%} of the patches that the networks see",
        ),
        Setting(
            "data.frames_per_second, data.short_side",
            f"{data.frames_per_second:g}, {data.short_side} pixels",
            "Frames kept of the video; a change means another ingest.",
            "disk in proportion to the first and to the square of the second",
        ),
    ]


def _patches(config: Config) -> dict[str, int]:
    """Patches of a clip that student and teacher see, by kind of view, object views counted whole."""
    crops, patch, frames = config.crops, config.model.patch_size, config.clip.num_frames
    whole = frames * (crops.global_size // patch) ** 2
    kinds: dict[str, Any] = {"globals": whole * config.num_globals}
    kinds["objects"] = 0 if config.tracking.kind == "none" else whole * config.tracking.num_objects
    kinds["locals"] = frames * crops.num_locals * (crops.local_size // patch) ** 2
    return kinds
