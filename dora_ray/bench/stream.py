"""Clip stream: Ray's overhead when reading clips, many ranks, memory, and the first step during an ingest.

Everything runs on this machine with a generated film; rates count clips that arrive in order at their rank.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import threading
import time
import uuid
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dora_ray.bench.cluster import CORES, Cpu, cluster, cpu_between, cpu_of_all
from dora_ray.bench.films import film, film_inputs
from dora_ray.bench.growth import measure, small_inputs
from dora_ray.clips.slot import SlotBatch, read_slot
from dora_ray.config import load_config
from dora_ray.training.inputs import Inputs

FILM: dict[str, Any] = {"width": 1280, "height": 720, "frames_per_second": 24, "seconds": 10, "group_size": 48}
SMALL_FILM: dict[str, Any] = {"width": 320, "height": 180, "frames_per_second": 24, "seconds": 10, "group_size": 48}
# Ten minutes as Walking Tours are: 4K, 60 frames a second, VP9. Looped: the decoder cannot tell.
LONG_FILM: dict[str, Any] = {
    "width": 3840,
    "height": 2160,
    "frames_per_second": 60,
    "seconds": 10,
    "group_size": 120,
    "codec": "vp9",
}
LONG_LOOPS, QUICK_LOOPS = 60, 6
TASK_CPUS = 0.5
# Slots of each stream, of the recipe paper's size and small ones; the first of each pair is for --quick.
SLOTS, SMALL_SLOTS = (48, 240), (400, 4000)
SMALL_SLOTS_PER_TASK = 16
MEMORY_SLOTS = (4000, 40_000)
# Bare reading and streams take turns, since the speed of a shared machine varies by the minute. Ratios are within one
# round, and the median round is reported.
ROUNDS = 3
# Warm-up: Ray starts its processes one after the other, each imports torch for seconds, and the object store's pages
# are slow when first touched.
WARM_SLOTS = 24


def run(*, quick: bool) -> dict[str, Any]:
    """Measure rates, ranks, memory and the first step.

    Args:
        quick: fewer slots, and one minute of 4K film instead of ten.
    """
    torch.set_num_threads(1)
    which = 0 if quick else 1
    config = load_config("paper", "clip.avoid_cuts=false", "optim.slots=8")
    small = load_config(
        "paper",
        *("clip.avoid_cuts=false", "crops.clip_size=64", "data.short_side=96"),
        *("optim.clips_per_slot=8", "optim.slots=8"),
    )
    with tempfile.TemporaryDirectory() as store, cluster():
        paper = film_inputs(config, film(**FILM, loops=3), f"{store}/paper")
        little = film_inputs(small, film(**SMALL_FILM, loops=3), f"{store}/small")
        with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as bare:
            found: dict[str, Any] = {}
            for size in (1, 4, 8):
                rates = _in_turns(bare, paper, SLOTS[which], size=size, slots_per_task=1)
                found |= {f"paper_{size}_ranks_{name}": value for name, value in rates.items()}
            for size in (1, 8):
                rates = _in_turns(bare, little, SMALL_SLOTS[which], size=size, slots_per_task=SMALL_SLOTS_PER_TASK)
                found |= {f"small_{size}_ranks_{name}": value for name, value in rates.items()}
        found |= _memory(f"{store}/smallest", MEMORY_SLOTS[which])
    return {
        "clips": f"{FILM['width']}x{FILM['height']} film, {config.clip.num_frames} frames, stored with short side "
        f"{config.data.short_side}, {config.optim.clips_per_slot} clips a slot",
        "small_clips": f"{small.crops.clip_size} px, {small.optim.clips_per_slot} clips a slot, "
        f"{SMALL_SLOTS_PER_TASK} slots a task",
        "cores": CORES,
        **found,
        **_first_step(QUICK_LOOPS if quick else LONG_LOOPS),
    }


def _in_turns(
    bare: ProcessPoolExecutor, inputs: Inputs, slots: int, *, size: int, slots_per_task: int
) -> dict[str, float]:
    """Alternate bare reading and the stream; return the median round by the stream's overhead."""
    through_ray(inputs, WARM_SLOTS * slots_per_task, size=size, slots_per_task=slots_per_task)
    rounds = []
    for _ in range(ROUNDS):
        alone = _bare_rate(bare, inputs, slots)
        stream = through_ray(inputs, slots, size=size, slots_per_task=slots_per_task)
        rounds.append(
            {
                "bare_clips_per_second": alone["clips_per_second"],
                "stream_clips_per_second": stream["clips_per_second"],
                "stream_overhead": 1 - stream["clips_per_second"] / alone["clips_per_second"],
                "stream_cpu_overhead": stream["cpu_seconds_a_clip"] / alone["cpu_seconds_a_clip"] - 1,
                "stream_first_slot_seconds": stream["first_seconds"],
            }
        )
    return sorted(rounds, key=lambda found: found["stream_overhead"])[ROUNDS // 2]


def _bare_rate(pool: ProcessPoolExecutor, inputs: Inputs, slots: int) -> dict[str, float]:
    """Return clips per second, and CPU seconds per clip, of the read function alone."""
    jobs = [pool.submit(_read_bare, inputs, range(start, slots, CORES)) for start in range(CORES)]
    rates, costs = zip(*(job.result() for job in jobs), strict=True)
    return {"clips_per_second": sum(rates), "cpu_seconds_a_clip": statistics.mean(costs)}


def _read(inputs: Inputs, number: int) -> SlotBatch:
    key = inputs.contents.key(*divmod(number, inputs.plan.slots))
    assert key is not None
    return read_slot(inputs.contents, key)


def _read_bare(inputs: Inputs, numbers: range) -> tuple[float, float]:
    torch.set_num_threads(1)
    _read(inputs, numbers[0])
    started, cpu = time.perf_counter(), time.process_time()
    for number in numbers:
        _read(inputs, number)
    clips = len(numbers) * inputs.plan.clips_per_slot
    return clips / (time.perf_counter() - started), (time.process_time() - cpu) / clips


def through_ray(inputs: Inputs, slots: int, *, size: int, slots_per_task: int) -> dict[str, float]:
    """Read slots through Ray Data; the ranks are threads that synchronize at every step, as in an all-reduce.

    Returns:
        clips_per_second and cpu_seconds_a_clip after the first quarter, and first_seconds until the first step.
    """
    import ray

    from dora_ray.clips.dataset import StreamSettings, deal, make_clips
    from dora_ray.clips.rank_stream import RankStream

    plan, steps = inputs.plan, max(2, -(-slots // inputs.plan.slots))
    settings = StreamSettings(
        run=uuid.uuid4().hex,
        num_steps=steps,
        slots_per_task=slots_per_task,
        prefetch=max(1, 4 // slots_per_task),
        decode_cpus=TASK_CPUS,
        decode_label=None,
        decode_seconds=120.0,
    )
    reference = (ray.put(inputs.contents),)
    started = time.perf_counter()
    moments: list[float] = []
    cpu: list[Cpu] = []

    def look() -> None:
        # Sampling all processes takes as long as reading a clip, so only two steps sample.
        if len(moments) in (steps // 4, steps - 1):
            cpu.append(cpu_of_all())
        moments.append(time.perf_counter())

    barrier = threading.Barrier(size, action=look)

    def rank(stream: RankStream) -> None:
        stream.start(0)
        for _ in stream.steps(0):
            barrier.wait()

    shards = deal(make_clips(reference, settings), size)
    with ThreadPoolExecutor(size) as pool:
        list(pool.map(rank, [RankStream(shard, plan, settings, rank=i, size=size) for i, shard in enumerate(shards)]))
    settled = steps // 4
    clips = (steps - 1 - settled) * plan.slots * plan.clips_per_slot
    return {
        "clips_per_second": clips / (moments[-1] - moments[settled]),
        "cpu_seconds_a_clip": cpu_between(cpu[0], cpu[-1]) / clips,
        "first_seconds": moments[0] - started,
    }


def _memory(store: str, slots: int) -> dict[str, float]:
    """Return the peak memory of every process of the cluster over a stream of small slots, and its slope."""
    growth, _ = measure(small_inputs(store), slots)
    return {
        f"{role}_{name}": figures[name]
        for role, figures in growth.roles().items()
        for name in ("most_mb", "mb_a_million_slots")
    }


def _first_step(loops: int) -> dict[str, float]:
    """Return seconds from launch to the first step, for training during its ingest and after it."""
    from dora_ray.training.launch import train

    path = film(**LONG_FILM, loops=loops)
    seconds: dict[str, float] = {}
    for shuffle in ("window", "global"):
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(
                "tiny",
                *(f"data.videos=[{path}]", f"clip.shuffle={shuffle}", "clip.window_segments=4"),
                *("data.segment_seconds=2", "data.frames_per_second=6", "optim.steps=1", "optim.warmup_steps=0"),
                *("optim.freeze_last_layer_steps=0", "cluster.num_workers=0", "run.log_every_steps=1"),
            )
            lines: list[dict[str, float]] = []
            started = time.time()
            train(config, out=Path(folder, "run"), progress=False, on_metrics=lines.append)
            seconds[shuffle] = lines[0]["time"] - started
    return {
        "film_minutes": loops * LONG_FILM["seconds"] / 60,
        "first_step_beside_the_ingest_seconds": seconds["window"],
        "first_step_after_the_ingest_seconds": seconds["global"],
        "first_step_sooner": seconds["global"] / seconds["window"],
    }
