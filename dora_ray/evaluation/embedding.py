"""Write an encoder's features of images or of a video's frames to a Parquet or NumPy .npz file.

Legend: M images or frames, D width, N patches of an image, S side in pixels.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dora_ray import files
from dora_ray.checkpoints import resolve_checkpoint
from dora_ray.errors import ConfigError, VideoError
from dora_ray.evaluation import check_device
from dora_ray.evaluation.feature_files import Embedded, check_target, new_file, open_sink
from dora_ray.evaluation.features import normalize, report_unreadable
from dora_ray.evaluation.images import SUFFIXES, center_crop, open_rgb, whole_size
from dora_ray.evaluation.shots import rgb
from dora_ray.folders import visible_files
from dora_ray.video.decoders import PyAVDecoder
from dora_ray.video.index import VideoIndex, index_video
from dora_ray.video.sources import find_videos
from dora_ray.weights import load_backbone

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

logger = logging.getLogger(__name__)

NUM_READERS = 4
# Length in seconds of a stretch of video that is decoded from one key frame: wanted frames may be far apart.
DECODED_SECONDS = 1.0
Progress = Callable[[int, int], None]  # called with (done, total)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image or a frame, ready for the encoder.

    Attributes:
        path: its file.
        seconds: time of a frame from the video's start; None for an image.
        pixels: (H, W, 3) uint8; H and W are multiples of the patch size.
    """

    path: str
    seconds: float | None
    pixels: np.ndarray


def embed(
    checkpoint: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    patches: bool = False,
    whole: bool = False,
    image_size: int | None = None,
    frames_per_second: float = 1.0,
    batch_size: int = 64,
    device: str = "cpu",
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an encoder's features of images, or of a video's frames.

    Args:
        checkpoint: Any checkpoint that `load_backbone` accepts.
        data: An image, a video, or a folder of images or videos, searched recursively.
        out: New FILE.parquet or FILE.npz. A .npz is collected in memory, and its patch grids must be equal.
        patches: Also write the patch tokens.
        whole: Use the whole picture, with short side `image_size`; else the center square of the kNN protocol.
        image_size: S, a multiple of the patch size; None: the encoder's training size.
        frames_per_second: Sampling rate r of a video: the frames shown at 0, 1 / r, 2 / r ... seconds, each once.
        batch_size: Pictures per forward pass.
        device: Where the encoder runs.
        skip_unreadable: Leave out images that cannot be read, with a warning.
        progress: Called with the number of pictures done and the total.

    Returns:
        out, checkpoint, rows, width (D), image_size and missing (frames and images that could not be read).

    Raises:
        ConfigError: `out` exists or has another suffix, or there is nothing to embed.
        CheckpointError: As `load_backbone`.
        VideoError: A video cannot be read.
    """
    target = check_target(out)
    if not frames_per_second > 0 or batch_size < 1:
        raise ConfigError(
            f"frames_per_second={frames_per_second:g} must be above 0, and batch_size={batch_size} at least 1."
        )
    source = resolve_checkpoint(checkpoint)
    images, videos = find_pictures(data)
    indexes = [index_video(path) for path in videos]
    vit = load_backbone(source).to(check_device(device))
    patch_size = int(vit.patch_embed.patch_size[0])
    size = int(vit.patch_embed.img_size[0]) if image_size is None else image_size
    if size < 1 or size % patch_size:
        raise ConfigError(f"image_size={size} is not a multiple of the encoder's patch size {patch_size}.")
    cut = _Cut(size, patch_size, whole=whole)
    total = len(images) + sum(len(index.kept_frames(frames_per_second)) for index in indexes)
    facts = {"checkpoint": source, "image_size": size, "whole": whole, "normalization": "imagenet"}
    facts |= {"frames_per_second": frames_per_second} if videos else {}
    pictures = itertools.chain(
        _read_images(images, cut, skip_unreadable=skip_unreadable),
        *(_read_frames(index, frames_per_second, cut) for index in indexes),
    )
    done = 0
    with new_file(target) as partial, open_sink(partial, target, facts) as sink:
        for batch in _batches(pictures, batch_size):
            sink.add(_embed(vit, batch, device=device, patches=patches, patch_size=patch_size))
            done += len(batch)
            if progress is not None:
                progress(done, total)
        if not done:
            raise VideoError(f"{os.fspath(data)}: no frame could be decoded; get the file again")
    if done < total:
        logger.warning("%d of %d pictures could not be read and are missing in %s", total - done, total, target)
    return {
        "out": target,
        "checkpoint": source,
        "rows": done,
        "width": vit.embed_dim,
        "image_size": size,
        "missing": total - done,
    }


def find_pictures(data: str | os.PathLike[str]) -> tuple[list[Path], list[str]]:
    """Return the images and videos in `data`: a file, a folder, or any value of `data.videos`.

    Raises:
        ConfigError: the folder holds neither.
        VideoError: nothing was found.
    """
    place = files.absolute(data)
    if os.path.isdir(place):
        images = visible_files(place, SUFFIXES)
        try:
            return images, find_videos([place])
        except VideoError as error:
            if not images:
                raise ConfigError(f"{place} holds neither images nor videos. Give a folder that does.") from error
            return images, []
    if Path(place).suffix.lower() in SUFFIXES and os.path.exists(place):
        return [Path(place)], []
    return [], find_videos([os.fspath(data)])


@dataclass(frozen=True)
class _Cut:
    """Resizes and crops pictures for the encoder."""

    size: int
    patch_size: int
    whole: bool

    @property
    def short_side(self) -> int:
        """Short side of a frame before cropping, pixels."""
        return self.size if self.whole else round(self.size * 256 / 224)

    def __call__(self, image: Image.Image) -> np.ndarray:
        if not self.whole:
            return np.asarray(center_crop(image, size=self.size))
        size = whole_size(image.size, short_side=self.size, patch_size=self.patch_size)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _read_images(paths: list[Path], cut: _Cut, *, skip_unreadable: bool) -> Iterator[Picture]:
    """Yield images in order, prefetched in threads, since Pillow decodes without the GIL.

    Raises:
        ConfigError: some images cannot be read; raised after the last one, naming all of them.
    """
    failures: list[str] = []
    with ThreadPoolExecutor(NUM_READERS) as pool:
        waiting: list[tuple[Path, Future[np.ndarray]]] = []
        for path in [*paths, *[None] * (2 * NUM_READERS)]:
            if path is not None:
                waiting.append((path, pool.submit(lambda path: cut(open_rgb(path)), path)))
            if waiting and (path is None or len(waiting) > 2 * NUM_READERS):
                first, future = waiting.pop(0)
                try:
                    yield Picture(str(first), None, future.result())
                except ConfigError as error:
                    failures.append(str(error))
    report_unreadable(failures, len(paths), skip_unreadable=skip_unreadable)


def _read_frames(index: VideoIndex, frames_per_second: float, cut: _Cut) -> Iterator[Picture]:
    """Yield the kept frames of a video that can be decoded, key frame by key frame."""
    wanted = index.pts[index.kept_frames(frames_per_second)]
    for segment in index.segments(DECODED_SECONDS):
        here = wanted[(wanted >= segment.start_pts) & (wanted < segment.stop_pts)]
        if segment.number == 0:
            here = wanted[wanted < segment.stop_pts]
        for frame in PyAVDecoder().decode(index, here.tolist(), short_side=cut.short_side):
            seconds = float(index.seconds(np.array(frame.pts)))
            yield Picture(index.path, seconds, cut(Image.fromarray(rgb(frame))))


def _batches(pictures: Iterable[Picture], batch_size: int) -> Iterator[list[Picture]]:
    """Batch successive pictures of equal size."""
    for _, alike in itertools.groupby(pictures, key=lambda picture: picture.pixels.shape):
        yield from (list(batch) for batch in _chunks(alike, batch_size))


def _chunks(pictures: Iterator[Picture], batch_size: int) -> Iterator[list[Picture]]:
    while batch := list(itertools.islice(pictures, batch_size)):
        yield batch


@torch.inference_mode()
def _embed(vit: VisionTransformer, batch: list[Picture], *, device: str, patches: bool, patch_size: int) -> Embedded:
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
    tokens = vit.forward_features(normalize(pixels.to(device))).float().cpu().numpy()
    height, width = pixels.shape[1:3]
    return Embedded(
        paths=[picture.path for picture in batch],
        seconds=[picture.seconds for picture in batch],
        cls=tokens[:, 0],
        patches=tokens[:, 1:] if patches else None,
        grid=(height // patch_size, width // patch_size),
    )
