"""Memory of direct streaming: flat over a long film, and that of a few pictures for a segment of a 4K film."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_ray.bench.data import _segment_memory
from dora_ray.bench.films import film

pytestmark = pytest.mark.slow

# Ten minutes, and what the process has had at most after each third of its clips.
STREAM = """
import itertools, json, os, sys
from dora_ray.bench.films import film
from dora_ray.config import load_config
from dora_ray.clips.segments import streamed_videos
from dora_ray.clips.stream import local_slots
from dora_ray.video.index import index_video
from dora_ray.training.launch import make_plan
from dora_ray.training.memory import peak_mb

index = index_video(film(width=320, height=180, frames_per_second=6, seconds=10, group_size=12, loops=60))
config = load_config(
    "paper", "clip.avoid_cuts=false", "clip.num_frames=2", "crops.clip_size=32", "optim.slots=1", "data.source=video",
    "data.shuffle_segments=2", "data.stream_segment_seconds=30", "data.short_side=180", "data.jpeg_quality=95",
)
plan = make_plan(config, streamed_videos([index], decoder="pyav", frames_per_second=6.0, short_side=180))
steps = plan.clips_per_epoch // plan.clips_per_slot
keys = iter([(step, 0) for step in range(steps)])
stream = local_slots(plan, keys, prefetch=4, num_threads=2, decode_seconds=60.0)
peaks = []
for _ in range(3):
    for batch in itertools.islice(stream, steps // 3):
        assert batch.valid.all()
    peaks.append(peak_mb())
print(json.dumps(peaks), flush=True)
os._exit(0)  # threads may be at the next pool: they cannot be joined
"""


def test_memory_is_flat_over_a_long_film(tmp_path: Path) -> None:
    """Its frames are 100 MB as JPEG; two pools of a minute each are held at a time."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", STREAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    first, _, last = json.loads(ended.stdout)
    assert last - first < 30


def test_a_streamed_4k_segment_takes_less_than_200_mb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A whole segment of the default length: 400 frames as JPEG beside the few pictures of the decoder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = film(width=3840, height=2160, frames_per_second=6, seconds=5, group_size=30, loops=14)
    idle, peak = _segment_memory(path)
    assert 20 < peak - idle < 200
