"""Packing of the clips file from videos, labeled images and DAVIS sequences, on a machine with decoders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dora_ray.bench.gpu.kit import ArrayVideo, Kit, Labeled, Pixels, Sequence, save_kit
from dora_ray.errors import ConfigError
from dora_ray.evaluation import davis
from dora_ray.evaluation.davis import Objects, find_sequences, read_masks
from dora_ray.evaluation.features import LabeledImages, find_splits
from dora_ray.evaluation.images import open_rgb
from dora_ray.video.decoders import DecodedFrame, get_decoder
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.sources import find_videos

MB = 2**20
VIDEO_SIDE, FRAMES_PER_SECOND = 144, 6.0
# Assumed compression ratios, tried in order until the file is small enough.
COMPRESSIONS = (1.5, 1.25, 1.0)
# Number of frames in each stretch of a video that does not fit as a whole.
STRETCH_FRAMES = 48
IMAGE_SIDE, MOST_TRAIN, MOST_TEST = 32, 2000, 500
SEQUENCE_SIDE, SEQUENCE_FRAMES, MOST_SEQUENCES = 120, 20, 4


def pack(*, videos: list[str], images: Path, sequences: Path, out: Path, limit_mb: float) -> Kit:
    """Write a clips file and check its size.

    Args:
        videos: files, folders or globs.
        images: FOLDER/train/CLASS/* and FOLDER/test/CLASS/*.
        sequences: a folder in the layout of DAVIS 2016.
        out: the file to write.
        limit_mb: maximum size in megabytes.

    Raises:
        ConfigError: the file would be too large, a video is too short, or a folder is invalid.
        VideoError: a video cannot be read.
    """
    train, test = find_splits(images)
    labeled = [_labeled(part, most) for part, most in ((train, MOST_TRAIN), (test, MOST_TEST))]
    masked = tuple(_sequence(one) for one in find_sequences(sequences)[:MOST_SEQUENCES])
    taken = sum(part.images.nbytes for part in labeled)
    taken += sum(one.frames.nbytes + one.masks.nbytes for one in masked)
    indices = [index_video(path) for path in find_videos(videos)]
    for compression in COMPRESSIONS:
        stretches = _stretches(indices, compression * limit_mb * MB - taken)
        kit = Kit(tuple(stretches), labeled[0], labeled[1], masked)
        save_kit(kit, out)
        if out.stat().st_size <= limit_mb * MB:
            return kit
    size = out.stat().st_size / MB
    out.unlink()
    raise ConfigError(f"the clips would take {size:.1f} MB, more than {limit_mb:g}: give fewer images or sequences")


def _labeled(part: LabeledImages, most: int) -> Labeled:
    thin = part.thinned(most)
    size = (IMAGE_SIDE, IMAGE_SIDE)
    pictures = [np.asarray(open_rgb(path).resize(size, Image.Resampling.BICUBIC)) for path in thin.paths]
    return Labeled(np.stack(pictures), thin.labels.numpy())


def _sequence(found: davis.Sequence) -> Sequence:
    """Return a sequence, evenly thinned and downscaled, with all its objects merged into one mask a frame."""
    frames, masks = found.frames, read_masks(found.masks)
    objects = Objects.of(masks[0], found.masks[0], together=True)
    rows = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), SEQUENCE_FRAMES)).round().astype(int))
    first = open_rgb(frames[0])
    scale = SEQUENCE_SIDE / min(first.size)
    size = (round(first.width * scale), round(first.height * scale))
    pictures = [np.asarray(open_rgb(frames[row]).resize(size, Image.Resampling.BICUBIC)) for row in rows]
    shapes = [_smaller(objects.split(masks[row])[0], size) for row in rows]
    return Sequence(found.name, np.stack(pictures), np.stack(shapes))


def _smaller(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 127


def _stretches(indices: list[VideoIndex], budget: float) -> Iterator[ArrayVideo]:
    """Yield frames of all videos, equally many of each: short videos whole, long ones as stretches."""
    for index in indices:
        kept = index.kept_frames(FRAMES_PER_SECOND)
        scale = min(1.0, VIDEO_SIDE / min(index.width, index.height))
        frame_bytes = 3 * (index.width * scale) * (index.height * scale)
        most = int(budget / len(indices) / frame_bytes)
        if most < STRETCH_FRAMES:
            raise ConfigError(f"only {most} frames of {index.path} fit: give fewer videos, or allow more megabytes")
        for number, rows in enumerate(_rows(len(kept), most)):
            frames = list(_decoded(index, kept[rows]))
            times = index.times[kept[rows]]
            if len(frames) == len(times):
                yield ArrayVideo(f"{index.name_of(index.path)}-{number}", np.stack(frames), times)


def _rows(count: int, most: int) -> Iterable[np.ndarray]:
    """Return positions among the kept frames: all, or stretches with evenly spaced starts."""
    if count <= most:
        return [np.arange(count)]
    stretches = most // STRETCH_FRAMES
    starts = np.linspace(0, count - STRETCH_FRAMES, stretches).round().astype(int)
    return [np.arange(start, start + STRETCH_FRAMES) for start in starts]


def _decoded(index: VideoIndex, positions: np.ndarray) -> Iterator[Pixels]:
    wanted = index.pts[positions].tolist()
    for frame in get_decoder("pyav").decode(index, wanted, short_side=VIDEO_SIDE):
        yield _rgb(frame)


def _rgb(frame: DecodedFrame) -> Pixels:
    """Convert JPEG planes to RGB."""
    size = (frame.width, frame.height)
    planes = [Image.fromarray(frame.y)]
    planes += [Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR) for plane in (frame.u, frame.v)]
    return np.asarray(Image.merge("YCbCr", planes).convert("RGB"))
