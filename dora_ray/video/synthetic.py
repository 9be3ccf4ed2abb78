"""Synthetic data: videos with painted frame numbers, and a small labeled image set from packaged photographs.

H, W height and width of a picture, pixels.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import simplejpeg
from PIL import Image

from dora_ray.errors import ConfigError

COUNTER_BITS = 16
# Block size as a share of the width, so that the counter survives any downscale that leaves a few pixels a block.
COUNTER_BLOCKS_ACROSS = 20
NUM_OBJECTS = 6
# Color photographs only: a gray class would be recognized by its color.
PHOTOGRAPHS: Mapping[str, tuple[str, str]] = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
CELLS = 4
LEAST_CONTRAST = 10.0


def make_video(
    path: str | Path,
    *,
    width: int,
    height: int,
    num_frames: int,
    frames_per_second: float,
    seed: int,
    cuts: Sequence[int] = (),
    codec: str = "libx264",
    group_size: int = 250,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Write a video of moving objects over a panning texture, with the frame number painted into every frame.

    Args:
        path: .mp4, .mkv, .webm, .ts ...: the suffix chooses the container.
        width: pixels, even; at least 80, for the numbers to be readable.
        height: pixels, even.
        num_frames: at most 65536, the range of the painted numbers.
        frames_per_second: constant.
        seed: the same seed gives the same pictures.
        cuts: frame numbers at which a new scene starts.
        codec: an encoder of PyAV's FFmpeg.
        group_size: frames between key frames.
        options: encoder options; default: a fast x264 preset.
    """
    frames = render_frames(width=width, height=height, num_frames=num_frames, seed=seed, cuts=cuts)
    chosen = {"preset": "veryfast"} if options is None and codec in ("libx264", "libx265") else dict(options or {})
    return encode_video(
        path, frames, frames_per_second=frames_per_second, codec=codec, group_size=group_size, options=chosen
    )


def render_frames(
    *, width: int, height: int, num_frames: int, seed: int, cuts: Sequence[int] = ()
) -> Iterator[np.ndarray]:
    """Yield the pictures of `make_video`, (H, W, 3) uint8 RGB."""
    starts = sorted({0, *cuts})
    scene: _Scene | None = None
    for number in range(num_frames):
        if number in starts or scene is None:
            scene = _Scene(width, height, np.random.default_rng([seed, starts.index(number)]))
        picture = scene.render(number)
        paint_counter(picture, number)
        yield picture


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """Undo the real-time priority that SVT-AV1 gives a root process and that its children would inherit.

    A browser or cluster at that priority can starve everything else on the machine.
    """
    try:
        yield
    finally:
        if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def encode_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    frames_per_second: float,
    codec: str,
    group_size: int = 250,
    options: Mapping[str, str] | None = None,
    pixel_format: str = "yuv420p",
    times: Sequence[float] | None = None,
    rotation: int = 0,
) -> Path:
    """Encode (H, W, 3) uint8 RGB pictures.

    Args:
        path: the suffix chooses the container.
        frames: pictures, all of one size.
        frames_per_second: nominal rate.
        codec: an encoder of PyAV's FFmpeg.
        group_size: maximum number of frames between key frames.
        options: encoder options.
        pixel_format: FFmpeg's name of the stored format.
        times: presentation time of each picture in seconds, ascending, for a variable rate.
        rotation: degrees counterclockwise by which players rotate the pictures: 0, 90, 180 or 270.
    """
    rate = Fraction(frames_per_second).limit_denominator(1001)
    base = Fraction(1, 90000) if times is not None else 1 / rate
    with ordinary_priority(), av.open(str(path), "w") as container:
        stream: av.VideoStream | None = None
        for number, picture in enumerate(frames):
            if stream is None:
                stream = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=dict(options or {})))
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pixel_format
                stream.gop_size = group_size
                stream.codec_context.time_base = base
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = number if times is None else round(times[number] / base)
            frame.time_base = base
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())
    return Path(path)


def paint_counter(picture: np.ndarray, number: int) -> None:
    """Paint `number` into the top of a (H, W, 3) picture: 16 blocks, white for 1, lowest bit first."""
    edges = np.rint(np.arange(COUNTER_BITS + 1) * picture.shape[1] / COUNTER_BLOCKS_ACROSS).astype(int).tolist()
    for bit, (left, right) in enumerate(itertools.pairwise(edges)):
        picture[: edges[1], left:right] = 255 if number >> bit & 1 else 0


def read_counter(picture: np.ndarray) -> int:
    """Read the number that `paint_counter` painted into a picture (H, W) or (H, W, 3), at any scale."""
    gray = picture.mean(-1) if picture.ndim == 3 else picture
    block = gray.shape[1] / COUNTER_BLOCKS_ACROSS
    low, high = round(block * 0.3), max(round(block * 0.3) + 1, round(block * 0.7))
    columns = [slice(round(block * bit) + low, round(block * bit) + high) for bit in range(COUNTER_BITS)]
    return sum(1 << bit for bit, column in enumerate(columns) if gray[low:high, column].mean() > 127)


def make_photo_classes(
    out: str | Path, *, seed: int, size: int = 64, num_train: int = 80, num_test: int = 40
) -> list[str]:
    """Write out/{train,test}/CLASS/NNN.jpg: crops of ten photographs shipped with scikit-image and scikit-learn.

    Each photograph is a class. It is divided like a chessboard into cells of a quarter of its short side: training
    crops lie in white cells, test crops in black ones, so no pixel is in both. A crop takes half to all of its cell's
    side, may be mirrored, and has a random mean and contrast in every channel, so that average color says nothing about
    the class.

    Accuracy on this set measures whether features of texture, edges and material generalize to other parts of the same
    photograph under changes of scale and color. It does not measure recognition of object categories, and its numbers
    compare only with each other: an encoder and a randomly initialized one on the same crops.

    Args:
        out: folder, created if missing.
        seed: the same seed gives the same files.
        size: side of a crop, pixels.
        num_train: training crops of each class.
        num_test: test crops of each class.

    Returns:
        The class names.

    Raises:
        ConfigError: scikit-image or scikit-learn is not installed.
    """
    for number, (name, (package, inner)) in enumerate(sorted(PHOTOGRAPHS.items())):
        with Image.open(package_file(package, inner)) as image:
            photograph = image.convert("RGB")
        for split, (parity, count) in enumerate(((0, num_train), (1, num_test))):
            folder = Path(out, ("train", "test")[split], name)
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, number, split])
            for k in range(count):
                crop = _photo_crop(photograph, parity, size, rng)
                (folder / f"{k:03d}.jpg").write_bytes(simplejpeg.encode_jpeg(crop, quality=95))
    return sorted(PHOTOGRAPHS)


class _Scene:
    """Panning canvas, half as large again as the picture, with objects that bounce off the picture's edges."""

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self._size = np.array([width, height])
        self._margin = self._size // 2
        across, down = (self._size + self._margin).tolist()
        self._canvas = _texture(across, down, rng)
        self._phase = rng.uniform(0, 2 * np.pi, 2)
        sides = rng.integers(max(4, height // 8), max(6, height // 3), NUM_OBJECTS)
        self._objects = [(_texture(side, side, rng), _disc(side)) for side in sides.tolist()]
        self._room = np.stack([self._size - side for side in sides])
        self._position = rng.uniform(0, 1, (NUM_OBJECTS, 2)) * self._room
        self._velocity = rng.uniform(-1, 1, (NUM_OBJECTS, 2)) * width / 100

    def render(self, number: int) -> np.ndarray:
        """Return the (H, W, 3) uint8 picture of a frame number; a pure function of it."""
        width, height = self._size
        x, y = np.rint(self._margin / 2 * (1 + np.sin(number / 100 + self._phase))).astype(int)
        picture = self._canvas[y : y + height, x : x + width].copy()
        # The triangle wave of a straight path is the path with reflections.
        path = (self._position + number * self._velocity) % (2 * self._room)
        corners = np.rint(np.minimum(path, 2 * self._room - path)).astype(int)
        for (texture, disc), (left, top) in zip(self._objects, corners.tolist(), strict=True):
            side = len(disc)
            np.copyto(picture[top : top + side, left : left + side], texture, where=disc[..., None])
        return picture


def _texture(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return (height, width, 3) uint8: noise at six scales, strongest at the coarsest, in four random colors."""
    size = (width, height)
    picture = Image.new("L", size, 127)
    for octave in range(6):
        cells = (3 << octave, 2 << octave)
        noise = Image.fromarray(rng.integers(0, 256, cells[::-1], np.uint8))
        picture = Image.blend(picture, noise.resize(size, Image.Resampling.BICUBIC), 0.8 / (1 + octave))
    anchors = rng.integers(0, 256, (4, 3))
    spread = np.interp(np.asarray(picture), np.quantile(np.asarray(picture), [0, 0.3, 0.7, 1]), np.linspace(0, 255, 4))
    palette = np.stack([np.interp(np.arange(256), np.linspace(0, 255, 4), anchors[:, c]) for c in range(3)], 1)
    colors: np.ndarray = np.rint(palette).astype(np.uint8)[spread.astype(np.uint8)]
    return colors


def _disc(side: int) -> np.ndarray:
    """Return (side, side) bool: the inscribed disc."""
    axis = np.linspace(-1, 1, side)
    return axis[:, None] ** 2 + axis**2 <= 1


def package_file(package: str, inner: str) -> Path:
    """Return the path of a photograph shipped with an installed package.

    Raises:
        ConfigError: the photograph is not found.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    place = Path(folders[0], inner) if folders else None
    if place is None or not place.exists():
        raise ConfigError(f"the photograph {package}/{inner} is missing; pip install scikit-image scikit-learn")
    return place


def _photo_crop(photograph: Image.Image, parity: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a (size, size, 3) uint8 crop from a chessboard cell of one color; flat crops (black sky) are redrawn."""
    cell = min(photograph.size) // CELLS
    columns, rows = photograph.width // cell, photograph.height // cell
    crop = np.zeros((size, size, 3), np.uint8)
    for _ in range(50):
        column, row = int(rng.integers(columns)), int(rng.integers(rows))
        side = int(rng.integers(cell // 2, cell + 1))
        left, top = (int(rng.integers(cell - side + 1)) for _ in range(2))
        if (column + row) % 2 != parity:
            continue
        box = (column * cell + left, row * cell + top, column * cell + left + side, row * cell + top + side)
        crop = np.asarray(photograph.resize((size, size), Image.Resampling.LANCZOS, box=box))
        if crop.std((0, 1)).mean() >= LEAST_CONTRAST:
            break
    return _recolored(crop[:, :: int(rng.choice([-1, 1]))], rng)


def _recolored(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pixels = crop.astype(np.float64)
    pixels = (pixels - pixels.mean((0, 1))) / np.maximum(pixels.std((0, 1)), 1.0)
    pixels = pixels * rng.uniform(30, 60, 3) + rng.uniform(90, 165, 3)
    return np.ascontiguousarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
