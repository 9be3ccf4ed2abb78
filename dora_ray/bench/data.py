"""Reading clips: our frame store beside the loader that opens the video anew for every clip and seeks.

Both read the same 8-frame clips, 1 s apart, of one generated 4K H.264 file, on one core, in one process, and end with a
300 x 300 crop.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dora_ray.data.augment import crop_clip, random_boxes
from dora_ray.data.decoders import get_decoder
from dora_ray.data.ingest import ingest
from dora_ray.data.store import read_frames
from dora_ray.data.synthetic import make_video
from dora_ray.data.video import VideoIndex, index_video

WIDTH, HEIGHT, RATE, NUM_FRAMES, CLIP_SIZE = 3840, 2160, 60, 8, 300


def run(*, quick: bool) -> dict[str, Any]:
    """CPU seconds of a clip from the store and from the reference loader, and frames a core-second of the ingest.

    Args:
        quick: a 10-second file and 2 reference clips instead of 30 seconds and 5.
    """
    seconds, reference_clips = (10, 2) if quick else (30, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "walk.mp4"))
        make_video(path, width=WIDTH, height=HEIGHT, num_frames=seconds * RATE, frames_per_second=RATE, seed=0)
        index = index_video(path)
        rng = np.random.default_rng(0)
        ingest_seconds = _ingest_cpu_seconds(index)
        (video,) = ingest(
            [path],
            store=str(Path(folder, "store")),
            decoder="pyav",
            frames_per_second=6,
            short_side=512,
            jpeg_quality=85,
            segment_seconds=20.0,
        )
        starts = rng.integers(0, len(video.times) - 6 * NUM_FRAMES, 50)
        stored = statistics.median(_cpu_seconds(lambda s=s: _store_clip(video, int(s), rng)) for s in starts)
        reference = statistics.median(
            _cpu_seconds(lambda s=s: _reference_clip(path, float(video.times[s]), rng))
            for s in starts[:reference_clips]
        )
    return {
        "file": f"{WIDTH}x{HEIGHT} H.264, {RATE} frames/s, {seconds} s",
        "clip": f"{NUM_FRAMES} frames, 1 s apart, cropped to {CLIP_SIZE} px",
        "reference_clips_per_core_second": 1 / reference,
        "store_clips_per_core_second": 1 / stored,
        "ratio": reference / stored,
        "ingest_frames_per_core_second": len(index.pts) / ingest_seconds,
    }


def _cpu_seconds(work: Any) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _ingest_cpu_seconds(index: VideoIndex) -> float:
    """Decoding and downscaling every kept frame of the file, without Ray and without the store."""
    decoder = get_decoder("pyav")
    kept = index.pts[index.kept_frames(6.0)].tolist()

    def decode_all() -> None:
        for _ in decoder.decode(index, kept, short_side=512):
            pass

    return _cpu_seconds(decode_all)


def _store_clip(video: Any, start: int, rng: np.random.Generator) -> np.ndarray:
    frames = read_frames(video, [start + 6 * i for i in range(NUM_FRAMES)])
    return crop_clip(frames, _box(rng, *frames[0].shape[:2]), CLIP_SIZE)


def _reference_clip(path: str, start: float, rng: np.random.Generator) -> np.ndarray:
    """Open the file, seek, decode up to each wanted frame at full size, crop."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        container.seek(int(start / stream.time_base), stream=stream)
        wanted = [start + i for i in range(NUM_FRAMES)]
        frames = []
        for frame in container.decode(stream):
            if frame.time >= wanted[len(frames)] - 0.5 / RATE:
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == NUM_FRAMES:
                    break
    return crop_clip(frames, _box(rng, HEIGHT, WIDTH), CLIP_SIZE)


def _box(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return random_boxes(rng, count=1, height=height, width=width, scale=(0.2, 1.0), ratio=(0.75, 4 / 3))[0]
