"""Clips read from the frame store, compared with a loader that opens the video for every clip.

All paths read 8-frame clips, 1 s apart, of one generated 4K H.264 film in one process. They are compared by CPU
seconds, which other processes disturb less than wall time. The reference loader works like the method's released code:
open the file, seek, decode at full size, crop in float, and augment each frame with PIL. It is written from scratch.

The decoding of the ingest is compared with plain decoding, also for VP9 and AV1 films.
"""

from __future__ import annotations

import importlib
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import v2

from dora_ray.bench.films import decode_frames, film, write_store
from dora_ray.clips.contents import StoredContents
from dora_ray.clips.crop import random_boxes
from dora_ray.clips.slot import read_slot
from dora_ray.config import Config, load_config
from dora_ray.errors import ConfigError
from dora_ray.store import datasets
from dora_ray.store.frames import StoredVideo, read_jpegs
from dora_ray.training.inputs import make_plan
from dora_ray.video.decoders import DecodedFrame, get_decoder
from dora_ray.video.index import VideoIndex, index_video

WIDTH, HEIGHT, RATE, GROUP_SIZE = 3840, 2160, 60, 250
SECONDS = 10
# Films of which only decoding is measured; they are short because their encoders are slow.
OTHER_CODECS, OTHER_SECONDS = ("vp9", "av1"), 2
# Upper bound of the clips per second that one H100 can train on.
CLIPS_A_GPU = 300


def run(*, quick: bool) -> dict[str, Any]:
    """Measure clips and frames per core-second of every path, memory and bytes, on one film.

    Args:
        quick: one clip of the reference loader, and H.264 only; otherwise three clips, and all codecs.
    """
    torch.set_num_threads(1)
    size: dict[str, Any] = {
        "width": WIDTH,
        "height": HEIGHT,
        "frames_per_second": RATE,
        "seconds": SECONDS,
        "group_size": GROUP_SIZE,
    }
    once = film(**size)
    config = load_config("paper", f"data.videos=[{once}]", "clip.avoid_cuts=false", "optim.slots=1")
    short = index_video(once)
    frames, decoding = _decoding(once, config)
    for codec in () if quick else OTHER_CODECS:
        rates = _decoding(film(**size | {"seconds": OTHER_SECONDS}, codec=codec), config)[1]
        decoding |= {f"{codec}_{name}": rate for name, rate in rates.items()}
    with tempfile.TemporaryDirectory() as store:
        stored, stored_bytes = _store_seconds(config, write_store(short, frames, config, store))
    references = [_reference_seconds(once, config, seed=seed) for seed in range(1 if quick else 3)]
    reference = {part: statistics.median(times[part] for times in references) for part in references[0]}
    return _report(
        {
            "film": f"{WIDTH}x{HEIGHT} H.264, {RATE} frames/s, {SECONDS} s",
            "clip": f"{config.clip.num_frames} frames, {config.clip.stride_seconds:g} s apart, "
            f"cropped to {config.crops.clip_size} px",
            "reference_cpu_seconds": {part: round(seconds, 3) for part, seconds in reference.items()},
            "ffmpeg": _plain_decoder()[0],
            **decoding,
            **_writing(frames, config),
            "stored_bytes_a_clip": stored_bytes,
            "cropped_bytes_a_clip": config.clip.num_frames * config.crops.clip_size**2 * 3,
        },
        {"reference": sum(reference.values()), "store": stored},
    )


def _report(facts: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the facts with each path's rate, its ratio and the cores that feed a GPU, from CPU seconds per clip."""
    rates = {f"{name}_clips_per_core_second": 1 / value for name, value in seconds.items()}
    ratios = {"store_ratio": seconds["reference"] / seconds["store"]}
    cores = {f"{name}_decode_cores_a_gpu": CLIPS_A_GPU * value for name, value in seconds.items()}
    return {**rates, **ratios, **facts, **cores, "cores_a_gpu_at_clips_per_second": CLIPS_A_GPU}


def _cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _decoding(path: str, config: Config) -> tuple[list[DecodedFrame], dict[str, float]]:
    """Measure frames per core-second of the ingest and of a plain decoder; also return the kept frames."""
    index = index_video(path)
    ingest, frames = _cpu_seconds(lambda: decode_frames(index, config))
    plain, other = _plain_decoder()[1](path), _decord_seconds(index, config)
    # The ingest stops at the last kept frame.
    through = np.searchsorted(index.pts, frames[-1].pts, side="right")
    return frames, {
        "ingest_frames_per_core_second": float(through) / ingest,
        "ffmpeg_frames_per_core_second": len(index.pts) / plain,
        **({"decord_frames_per_core_second": float(through) / other} if other else {}),
    }


def _decord_seconds(index: VideoIndex, config: Config) -> float:
    """Return decord's CPU seconds for the same frames; 0 if it is not installed, or refuses the film."""
    try:
        decoder = get_decoder("decord")
    except ConfigError:
        return 0.0
    if decoder.refusal(index):
        return 0.0
    chosen = load_config(config, "data.decoder=decord")
    return _cpu_seconds(lambda: decode_frames(index, chosen))[0]


def _writing(frames: list[DecodedFrame], config: Config) -> dict[str, float]:
    """Return CPU milliseconds of a kept frame's JPEG encoding and of its write; the signature is in neither."""
    quality = config.data.jpeg_quality
    coding, _ = _cpu_seconds(lambda: [simplejpeg.encode_jpeg_yuv_planes(f.y, f.u, f.v, quality) for f in frames])
    rows = [datasets.frame_row(frame, segment=0, jpeg_quality=quality) for frame in frames]
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder, "frames.lance"))
        datasets.create_dataset(uri)
        writing, _ = _cpu_seconds(lambda: datasets.commit(uri, datasets.write_rows(uri, rows)))
    return {"jpeg_ms_a_kept_frame": 1e3 * coding / len(rows), "write_ms_a_kept_frame": 1e3 * writing / len(rows)}


def _store_seconds(config: Config, video: StoredVideo) -> tuple[float, int]:
    """Return the CPU seconds of a clip from the store, and its stored bytes."""
    plan = make_plan(config, [video])
    contents = StoredContents(plan, [video])
    keys = [contents.key(step, 0) for step in range(4)]
    read_slot(contents, keys[0])
    seconds, _ = _cpu_seconds(lambda: [read_slot(contents, key) for key in keys[1:]])
    coded = sum(len(jpeg) for jpeg in read_jpegs(video, plan.clip(0).frames))
    return seconds / (3 * plan.clips_per_slot), coded


def _box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    box: np.ndarray = random_boxes(rng, count=1, height=height, width=width, scale=scale, ratio=ratio)[0]
    return box


def _reference_seconds(path: str, config: Config, *, seed: int) -> dict[str, float]:
    """Return the CPU seconds of one clip's parts in the released code's way.

    The clip begins in the middle of a group of pictures, the average case for the frames to decode before it.
    """
    rng = np.random.default_rng(seed)
    clip, crops = config.clip, config.crops
    span = (clip.num_frames - 1) * clip.stride_seconds
    start = min(GROUP_SIZE / RATE / 2, SECONDS - span - 0.5)
    decoding, frames = _cpu_seconds(lambda: _decode_at_full_size(path, start, clip.num_frames, clip.stride_seconds))
    box = _box(rng, HEIGHT, WIDTH, crops.clip_scale, crops.aspect_ratio)
    cropping, cropped = _cpu_seconds(lambda: _crop_in_float(frames, box, crops.clip_size))
    augmenting, _ = _cpu_seconds(lambda: _augment_with_pil(cropped, config))
    return {"decode": decoding, "crop": cropping, "augment": augmenting}


def _decode_at_full_size(path: str, start: float, num_frames: int, stride_seconds: float) -> list[np.ndarray]:
    """Open the file, seek to the key frame before the clip, and decode up to its last frame."""
    wanted = [start + i * stride_seconds for i in range(num_frames)]
    frames: list[np.ndarray] = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        assert stream.time_base is not None
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time is not None and frame.time >= wanted[len(frames)] - 0.5 / RATE:
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == num_frames:
                    break
    return frames


def _crop_in_float(frames: list[np.ndarray], box: np.ndarray, size: int) -> torch.Tensor:
    """Convert all frames to float at full size, then crop and resize: (T, 3, S, S) in [0, 255]."""
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    top, left, height, width = (int(number) for number in box)
    cut: torch.Tensor = v2.functional.resized_crop(clip, top, left, height, width, [size, size], antialias=False)
    return cut


def _augment_with_pil(clip: torch.Tensor, config: Config) -> list[Image.Image]:
    """Return a global view and the local views of each frame, one picture at a time."""
    crops = config.crops
    color = [
        v2.RandomApply([v2.ColorJitter(*crops.jitter)], p=crops.jitter_probability),
        v2.RandomGrayscale(crops.gray_probability),
        v2.GaussianBlur(9, crops.blur_sigma),
    ]
    whole = v2.Compose([v2.RandomResizedCrop(crops.global_size, crops.global_scale), v2.RandomHorizontalFlip(), *color])
    local = v2.Compose([v2.RandomResizedCrop(crops.local_size, crops.local_scale), v2.RandomHorizontalFlip(), *color])
    pictures = [Image.fromarray(frame.permute(1, 2, 0).byte().numpy()) for frame in clip]
    return [view(picture) for picture in pictures for view in (whole, *([local] * crops.num_locals))]


def _plain_decoder() -> tuple[str, Callable[[str], float]]:
    """Return the name of a single-threaded decode-only program, and a function that measures its CPU seconds."""
    binary = shutil.which("ffmpeg") or _packaged_ffmpeg()
    if binary is None:
        return "PyAV (no ffmpeg found)", lambda path: _cpu_seconds(lambda: _decode_only(path))[0]
    return f"{Path(binary).name} -threads 1", lambda path: _child_cpu_seconds(
        [binary, "-v", "error", "-threads", "1", "-i", path, "-map", "0:v:0", "-f", "null", "-"]
    )


def _packaged_ffmpeg() -> str | None:
    """Return the executable of the package imageio-ffmpeg, if installed."""
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def _child_cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _decode_only(path: str) -> None:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for _ in container.decode(stream):
            pass
