"""Consistency rules between the sections of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_ray.config import Config

# Attempts before a hanging task is given up: two for each of two clips.
DECODE_ATTEMPTS = 4
# Row lengths of fp8 matrix products must be a multiple of this (method.fp8).
FP8_MULTIPLE = 16


def broken_rules(config: Config) -> list[str]:
    """Return a message for each broken rule: what was given, what is allowed, what to change."""
    return [*_of_objects(config), *_of_views(config), *_of_data(config), *_of_steps(config), *_of_sizes(config)]


def _of_objects(config: Config) -> Iterator[str]:
    model, tracking, num_locals = config.model, config.tracking, config.crops.num_locals
    if tracking.kind != "none" and tracking.num_objects > model.num_heads:
        yield (
            f"tracking.num_objects={tracking.num_objects} exceeds the encoder's {model.num_heads} attention heads, and"
            f" each object needs its own: use at most {model.num_heads}, or raise model.num_heads"
        )
    if -tracking.block > model.depth:
        yield (
            f"tracking.block={tracking.block} is outside the encoder's {model.depth} blocks: use -{model.depth} to -1"
        )
    if tracking.views == "packed" and tracking.threshold == "soft":
        yield "tracking.views=packed with tracking.threshold=soft: a soft mask drops no patches; use clip or batch"
    if tracking.every_steps > 1 and tracking.kind != "none" and num_locals == 0:
        yield (
            f"tracking.every_steps={tracking.every_steps} with crops.num_locals=0: the steps without objects would have"
            " no loss"
        )
    if tracking.every_steps > 1 and config.loss.reduction != "mean":
        yield (
            f"tracking.every_steps={tracking.every_steps} with loss.reduction=released: its running sum needs objects"
            " in every step"
        )


def _of_views(config: Config) -> Iterator[str]:
    crops, kind = config.crops, config.tracking.kind
    if kind != "none" and config.num_globals != 1:
        yield (f"crops.num_globals={crops.num_globals} with tracking.kind={kind}: objects are tracked in 1 global view")
    if kind == "none" and config.num_globals != 2:
        yield "crops.num_globals=1 with tracking.kind=none: DINO compares 2 global views"
    if config.loss.reduction == "released" and kind != "none" and crops.num_locals == 1:
        yield "loss.reduction=released drops the first local view: use crops.num_locals of 0, or of 2 and more"
    for name in ("clip_scale", "global_scale", "local_scale", "aspect_ratio"):
        low, high = getattr(crops, name)
        if not 0 < low <= high or (high > 1 and name != "aspect_ratio"):
            yield f"crops.{name}={[low, high]} must be [low, high], 0 < low <= high"


def _of_data(config: Config) -> Iterator[str]:
    data, clip = config.data, config.clip
    if clip.shuffle == "window" and data.cache is not None:
        yield (
            f"data.cache={data.cache} with clip.shuffle=window: a growing store cannot be copied; ingest first"
            " (dora-ray data ingest) and use clip.shuffle=global, or leave data.cache out"
        )
    if data.frames_per_second * clip.stride_seconds < 1:
        yield (
            f"clip.stride_seconds={clip.stride_seconds} is shorter than the time between the"
            f" {data.frames_per_second:g} frames per second that are kept: raise one of the two"
        )
    longest = DECODE_ATTEMPTS * data.decode_seconds
    if config.cluster.stall_seconds <= longest:
        yield (
            f"cluster.stall_seconds={config.cluster.stall_seconds:g} with data.decode_seconds={data.decode_seconds:g}:"
            f" a step may wait for {DECODE_ATTEMPTS} hanging attempts before its clips are given up; set more than"
            f" {longest:g}, or lower data.decode_seconds"
        )


def _of_steps(config: Config) -> Iterator[str]:
    optim, workers = config.optim, config.cluster.num_workers
    if optim.num_warmup_steps > optim.steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} exceeds optim.steps={optim.steps}: lower the warm-up too, or"
            " give it as a share of the run, such as optim.warmup_steps=0.2"
        )
    if config.max_workers > optim.slots:
        yield (
            f"cluster.num_workers={workers} asks for more workers than the {optim.slots} slots of a step: use at most"
            f" {optim.slots} workers, or raise optim.slots"
        )
    if not isinstance(workers, int) and not 1 <= workers[0] <= workers[1]:
        yield f"cluster.num_workers={workers} must be [fewest, most] with 1 <= fewest <= most"


def _of_sizes(config: Config) -> Iterator[str]:
    model, crops = config.model, config.crops
    if config.optim.teacher_precision == "fp8" and model.width % FP8_MULTIPLE:
        yield (
            f"optim.teacher_precision=fp8 with model.width={model.width}: matrix products in fp8 need a multiple of"
            f" {FP8_MULTIPLE}; use bf16, or another width"
        )
    for name, size in {"crops.global_size": crops.global_size, "crops.local_size": crops.local_size}.items():
        if size % model.patch_size:
            yield f"{name}={size} is not a multiple of the patch size {model.patch_size}"
