"""Workload of a configuration, computed from shapes; nothing is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from dora_ray.config import Config
from dora_ray.errors import ConfigError
from dora_ray.method.dora import build_network
from dora_ray.planning.model import Film, Workload
from dora_ray.video.index import VideoIndex
from dora_ray.weights import network_arguments

FILM = re.compile(r"(?P<seconds>[\d.]+)s,(?P<width>\d+)x(?P<height>\d+),(?P<rate>[\d.]+),(?P<codec>\w+)")


def film_of(index: VideoIndex) -> Film:
    """Describe a video for the model, without time gaps, which are neither decoded nor kept."""
    seconds = index.shown_seconds
    return Film(seconds, index.coded_width, index.coded_height, len(index.pts) / seconds, index.codec)


def parse_film(text: str) -> Film:
    """Parse a hypothetical film from SECONDSs,WIDTHxHEIGHT,FPS,CODEC.

    Raises:
        ConfigError: the text has another form.
    """
    found = FILM.fullmatch(text)
    if found is None:
        raise ConfigError(f"--film {text} is not of the form 6600s,3840x2160,60,vp9 (seconds, size, frames/s, codec)")
    return Film(
        float(found["seconds"]), int(found["width"]), int(found["height"]), float(found["rate"]), found["codec"]
    )


def workload_of(config: Config, films: Sequence[Film]) -> Workload:
    """Return the workload of a configuration on the given films."""
    count, rate = _parameters(config), config.data.frames_per_second
    shapes = [(film.width, film.height, film.seconds) for film in films] or [(16, 9, 1.0)]
    widest = sum(max(w, h) / min(w, h) * weight for w, h, weight in shapes) / sum(weight for *_, weight in shapes)
    return Workload(
        films=tuple(films),
        kept_frames=round(sum(film.seconds * min(film.frames_per_second, rate) for film in films)),
        stored_pixels=round(config.data.short_side**2 * widest),
        steps=config.optim.steps,
        slots=config.optim.slots,
        clips_per_slot=config.optim.clips_per_slot,
        frames=config.clip.num_frames,
        clip_bytes=config.clip.num_frames * config.crops.clip_size**2 * 3,
        tflop_per_clip=flop_of_slot(config) / config.optim.clips_per_slot / 1e12,
        checkpoint_bytes=16 * count,  # student, teacher and two moments in float32
        sum_bytes=(8 if config.optim.reduction == "exact" else 4) * count,
        checkpoint_seconds=config.run.checkpoint_seconds,
    )


def _parameters(config: Config) -> int:
    with torch.device("meta"):
        network = build_network(**network_arguments(config.model_dump(mode="json")))
    return sum(parameter.numel() for parameter in network.parameters())


def flop_of_slot(config: Config) -> float:
    """Return the floating-point operations of one slot's matrix products, forward and backward.

    The teacher runs forward; the student runs forward and, at twice the cost, backward; heads see one token per view.
    """
    crops, head = config.crops, config.head
    images = config.optim.clips_per_slot * config.clip.num_frames
    large = config.num_globals if config.tracking.kind == "none" else config.tracking.num_objects
    of_large, of_small = (_flop_of_view(config, size) for size in (crops.global_size, crops.local_size))
    backbone = config.num_globals * of_large + 3 * (large * of_large + crops.num_locals * of_small)
    widths = [config.model.width] + [head.hidden_width] * (head.num_layers - 1)
    widths += [head.bottleneck_width, head.num_outputs]
    of_head = sum(2 * before * after for before, after in pairwise(widths))
    views = config.num_globals + 3 * (large + crops.num_locals)
    return float(images * (backbone + views * of_head))


def _flop_of_view(config: Config, size: int) -> float:
    """Return the cost of one image: n tokens cost 24 n D^2 + 4 n^2 D in a block; in the last, only CLS is finished."""
    model = config.model
    patches, width = (size // model.patch_size) ** 2, model.width
    tokens = patches + 1
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    last = 4 * tokens * width**2 + 20 * width**2 + 4 * tokens * width
    return patches * 6 * model.patch_size**2 * width + (model.depth - 1) * block + last
