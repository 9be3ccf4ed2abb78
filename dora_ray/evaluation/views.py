"""Held-out view matching on any video: retrieve a scene from a later frame or from a small crop of it.

Legend: N scenes, S side of the encoder's input, D width.

The scenes are N frames, evenly spaced over the film. Each one is retrieved among all N from another view of it: the
center of a frame some time later (later), or a small crop of the frame itself (local). Every view gets a random
contrast and brightness, so that brightness alone does not help. Chance is 1 / N.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dora_ray import files
from dora_ray.errors import ConfigError, VideoError
from dora_ray.evaluation.features import Progress, final_cls, normalize
from dora_ray.evaluation.images import SUFFIXES, center_crop, open_rgb
from dora_ray.evaluation.matching import match_views, rank_me
from dora_ray.evaluation.shots import rgb
from dora_ray.video.decoders import PyAVDecoder
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.sources import find_videos
from dora_ray.video.tour_files import FILM

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SHORT_SIDE = 360  # short side of the decoded frames, pixels
LEAST_SCENES = 4
SCENE, LATER, LOCAL = range(3)


@dataclass(frozen=True, eq=False)
class Views:
    """Views of N scenes, each (N, S, S, 3) uint8: the scenes, later frames, local crops."""

    scenes: np.ndarray
    later: np.ndarray
    local: np.ndarray


def read_views(
    data: str | os.PathLike[str],
    *,
    num_scenes: int,
    gap_seconds: float,
    gap_frames: int,
    local_scale: float,
    size: int,
    seed: int,
    progress: Progress | None = None,
) -> Views:
    """Read the views of a film's scenes.

    Args:
        data: A video file, a tour's folder (its film), or a folder of frames, sorted by name.
        num_scenes: Maximum N; fewer if later frames would be nearer to the next scene than to their own.
        gap_seconds: Time from a scene to its later frame, in a video.
        gap_frames: Number of frames from a scene to its later frame, in a folder of frames.
        local_scale: Side of a local crop, as a share of the frame's short side.
        size: S.
        seed: Seed of the crops' positions and the lighting.
        progress: Called with the number of scenes read and the number requested.

    Raises:
        ConfigError: The folder has no frames, or too few for 4 scenes.
        VideoError: The video cannot be read, or is too short for 4 scenes.
    """
    pairs = _pairs(os.fspath(data), num_scenes=num_scenes, gap_seconds=gap_seconds, gap_frames=gap_frames)
    rng = np.random.default_rng(seed)
    views: tuple[list[np.ndarray], ...] = ([], [], [])
    for number, (first, later) in enumerate(pairs, start=1):
        if progress is not None:
            progress(number, num_scenes)
        scene, after = (Image.fromarray(frame) for frame in (first, later))
        for kind, picture in (
            (SCENE, center_crop(scene, size=size)),
            (LATER, center_crop(after, size=size)),
            (LOCAL, _local_crop(scene, local_scale, size, rng)),
        ):
            views[kind].append(relight(np.asarray(picture), rng))
    return Views(*(np.stack(part) for part in views))


def _pairs(
    data: str, *, num_scenes: int, gap_seconds: float, gap_frames: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each scene's frame and its later frame, (H, W, 3) uint8."""
    film = find_film(data)
    if not files.is_remote(film) and Path(film).is_dir():
        return _pairs_of_folder(Path(film), num_scenes=num_scenes, gap=gap_frames)
    return _pairs_of_video(index_video(film), num_scenes=num_scenes, gap=gap_seconds)


def find_film(data: str | os.PathLike[str]) -> str:
    """Return the absolute path or URI of a video, of a tour's film, or of a folder of frames.

    Raises:
        ConfigError: A glob matches several videos.
        VideoError: Nothing was found.
    """
    path = files.absolute(data)
    if not files.is_remote(path) and Path(path).is_dir():
        return str(Path(path, FILM)) if Path(path, FILM).is_file() else path
    found = find_videos([os.fspath(data)])
    if len(found) > 1:
        raise ConfigError(f"{os.fspath(data)} matches {len(found)} videos: give one of them")
    return found[0]


def _pairs_of_folder(folder: Path, *, num_scenes: int, gap: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ConfigError(f"{folder} has no frames: give a video, a tour's folder or a folder of images")
    starts = scene_starts(len(paths) - 1, gap=gap, num_scenes=num_scenes)
    if starts is None:
        raise ConfigError(f"{folder} has {len(paths)} frames: {LEAST_SCENES} scenes need more, or a smaller gap_frames")
    for start in starts:
        number = int(start)
        yield np.asarray(open_rgb(paths[number])), np.asarray(open_rgb(paths[number + gap]))


def _pairs_of_video(index: VideoIndex, *, num_scenes: int, gap: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    starts = scene_starts(float(index.times[-1]), gap=gap, num_scenes=num_scenes)
    if starts is None:
        raise VideoError(
            f"{index.path}: lasts {index.times[-1]:.2f} s; {LEAST_SCENES} scenes need more, or a smaller gap_seconds"
        )
    decoder = PyAVDecoder()
    for start in starts:
        # Add half a tick, so that rounded times fall on their frames.
        wanted = np.array([start, start + gap]) + index.tick / 2
        pts = index.pts[np.searchsorted(index.times, wanted, side="right") - 1].tolist()
        decoded = [rgb(frame) for frame in decoder.decode(index, pts, short_side=SHORT_SIDE)]
        if len(decoded) == len(pts):
            yield decoded[0], decoded[1]


def scene_starts(last: float, *, gap: float, num_scenes: int) -> np.ndarray | None:
    """Place scenes evenly from 0 to `last` - `gap`, at least twice the gap apart; None if 4 do not fit."""
    fitting = min(num_scenes, int((last - gap) // (2 * gap)) + 1)
    return np.linspace(0, last - gap, fitting) if fitting >= LEAST_SCENES else None


def _local_crop(frame: Image.Image, scale: float, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a square crop from a random position, resized to S x S."""
    side = scale * min(frame.size)
    left, top = rng.uniform(0, 1, 2) * (np.array(frame.size) - side)
    return frame.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def relight(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change the contrast of (S, S, 3) uint8 by a factor of 0.6 to 1.4, and its brightness by up to 30 levels."""
    values = pixels.astype(np.float64)
    mean = values.mean()
    lit: np.ndarray = np.rint((values - mean) * rng.uniform(0.6, 1.4) + mean + rng.uniform(-30, 30))
    return lit.clip(0, 255).astype(np.uint8)


@torch.inference_mode()
def measure_views(backbone: VisionTransformer, views: Views, *, batch_size: int, device: str) -> dict[str, Any]:
    """Match the given views; return the results of `evaluate_views`."""
    scenes, later, local = (
        _features(backbone, pictures, batch_size=batch_size, device=device)
        for pictures in (views.scenes, views.later, views.local)
    )
    samples = {name: match_views(queries, scenes).tolist() for name, queries in (("later", later), ("local", local))}
    both = [(one + other) / 2 for one, other in zip(samples["later"], samples["local"], strict=True)]
    samples = {"view_matching": both} | {f"view_matching_{name}": values for name, values in samples.items()}
    return {name: float(np.mean(values)) for name, values in samples.items()} | {
        "chance": 1 / len(scenes),
        "rankme": rank_me(scenes),
        "num_scenes": len(scenes),
        "samples": samples,
    }


def _features(vit: VisionTransformer, pictures: np.ndarray, *, batch_size: int, device: str) -> Tensor:
    encode = final_cls(vit)
    batches = torch.split(torch.from_numpy(pictures), batch_size)
    return torch.cat([encode(normalize(batch.to(device))).float() for batch in batches])


def evaluate_views(
    backbone: VisionTransformer,
    data: str | os.PathLike[str],
    *,
    image_size: int,
    num_scenes: int,
    gap_seconds: float,
    gap_frames: int,
    local_scale: float,
    draw_seed: int,
    batch_size: int,
    device: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate view matching on a video's scenes.

    Args:
        backbone: On `device`, in evaluation mode.
        data: As `read_views`.
        image_size: Side of the square views, pixels.
        num_scenes: As `read_views`.
        gap_seconds: As `read_views`.
        gap_frames: As `read_views`.
        local_scale: As `read_views`.
        draw_seed: Seed of the crops' positions and the lighting.
        batch_size: Views per forward pass.
        device: Where the encoder runs.
        progress: As `read_views`.

    Returns:
        view_matching, the mean of view_matching_later and view_matching_local; their chance level; rankme of the
        scenes' features; num_scenes; and samples: the matches of each scene.

    Raises:
        ConfigError: As `read_views`.
        VideoError: As `read_views`.
    """
    views = read_views(
        data,
        num_scenes=num_scenes,
        gap_seconds=gap_seconds,
        gap_frames=gap_frames,
        local_scale=local_scale,
        size=image_size,
        seed=draw_seed,
        progress=progress,
    )
    return measure_views(backbone, views, batch_size=batch_size, device=device)
