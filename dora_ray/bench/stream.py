"""The clip stream: what Ray adds to the reading of clips, waits at pool boundaries, many ranks, memory, shuffling.

Everything runs on this machine with a film of its own; rates are of clips that arrive in order at their rank.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from dora_ray.bench.films import decode_frames, film, write_store
from dora_ray.bench.shuffling import shuffling, streamed
from dora_ray.clips.plan import Plan
from dora_ray.clips.ray_engine import plan_of
from dora_ray.clips.slot import SlotBatch, read_slot
from dora_ray.clips.stream import local_slots, ray_slots
from dora_ray.cluster.starting import prepare_ray
from dora_ray.config import Config, load_config
from dora_ray.training.launch import make_plan
from dora_ray.training.memory import peak_mb
from dora_ray.video.index import VideoIndex, index_video

FILM = {"width": 1280, "height": 720, "frames_per_second": 24, "seconds": 10, "group_size": 48}
SMALL_FILM = {"width": 320, "height": 180, "frames_per_second": 24, "seconds": 10, "group_size": 48}
CORES = 2
# Of a task, as the configuration has it: twice as many as there are cores, so that none waits for its next task.
TASK_CPUS = 0.5
# Steps of each stream, steps of the waiting rank, and slots of all ranks together; the first are for --quick.
STEPS, WAIT_STEPS, RANK_SLOTS = (60, 400), (30, 90), (192, 512)
FEWEST_SLOTS = 40
# Rounds in which the bare reading and the streams take turns, since a shared machine is quick in one minute and slow in
# the next: ratios are of one round, and the round in the middle is told.
ROUNDS = 3
# Ray starts its processes one after the other, each imports torch for seconds, and the object store's pages are slow at
# their first touch: what is measured within that time is the start.
WARM_SECONDS = 12.0
WARM_STEPS = 10
# A rank asks for this share of what the stream could give, as a GPU would that is fed well.
DEMAND = 0.6


def run(*, quick: bool) -> dict[str, Any]:
    """Rates, waits, ranks and shuffling.

    Args:
        quick: fewer steps, at most 8 ranks, and no long film.
    """
    torch.set_num_threads(1)
    steps, wait_steps, rank_slots = (of[0 if quick else 1] for of in (STEPS, WAIT_STEPS, RANK_SLOTS))
    index = index_video(film(**FILM, loops=3))
    config = load_config("paper", "clip.avoid_cuts=false", "optim.clips_per_slot=4")
    with tempfile.TemporaryDirectory() as store:
        plan = make_plan(config, [write_store(index, decode_frames(index, config), config, store)])
        with _cluster(), ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as bare:
            _warm(bare, plan)
            rates = _in_turns(bare, plan, steps, ("stream", "ray_data_tasks"))
            waits = _waits(_direct_plan(config, index), wait_steps)
            ranks = _ranks((1, 4, 8) if quick else (1, 4, 8, 64), rank_slots)
            if not quick:
                # Last, because Ray Data's actors keep their CPUs for a while.
                rates = _in_turns(bare, plan, steps, ("ray_data_actors",)) | rates
    memory = {} if quick else {"direct_30_minutes_peak_rss_mb": _memory_over_a_long_film()}
    return {
        "clips": f"{FILM['width']}x{FILM['height']} film, {config.clip.num_frames} frames, stored with short side "
        f"{config.data.short_side}, {config.optim.clips_per_slot} clips a slot",
        "cores": CORES,
        **rates,
        **waits,
        **ranks,
        **memory,
        **shuffling(config, index),
    }


@contextmanager
def _cluster() -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    already = ray.is_initialized()
    if not already:
        prepare_ray(starts=True)
        ray.init(
            address="local",
            num_cpus=CORES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=2**30,
            _system_config={"num_workers_soft_limit": 64},
        )
    try:
        yield
    finally:
        if not already:
            ray.shutdown()


def _warm(bare: ProcessPoolExecutor, plan: Plan) -> None:
    """Take slots until every process has read some, and the object store has been filled."""
    until = time.perf_counter() + WARM_SECONDS
    stream = _open("stream", plan, 10**6)
    while time.perf_counter() < until:
        next(stream)
    stream.close()
    _bare_rate(bare, plan, 4 * CORES)


def _open(way: str, plan: Plan, steps: int) -> Any:
    if way == "stream":
        return _through_ray(plan, range(steps), num_streams=1)
    return _through_ray_data(plan, steps, actors=way == "ray_data_actors")


def _in_turns(bare: ProcessPoolExecutor, plan: Plan, steps: int, ways: Sequence[str]) -> dict[str, float]:
    """Of rounds in which the bare reading and each of the ways have their turn, the median one by the first way."""
    rounds = []
    for _ in range(ROUNDS):
        alone = _bare_rate(bare, plan, steps)
        found = {"bare_clips_per_second": alone["clips_per_second"]}
        for way in ways:
            rate = _rate(_open(way, plan, steps), plan, steps)
            found |= {
                f"{way}_clips_per_second": rate["clips_per_second"],
                f"{way}_overhead": 1 - rate["clips_per_second"] / alone["clips_per_second"],
                f"{way}_cpu_overhead": rate["cpu_seconds_a_clip"] / alone["cpu_seconds_a_clip"] - 1,
                f"{way}_first_slot_seconds": rate["first_seconds"],
            }
        rounds.append(found)
    return sorted(rounds, key=lambda found: found[f"{ways[0]}_overhead"])[ROUNDS // 2]


def _bare_rate(pool: ProcessPoolExecutor, plan: Plan, steps: int) -> dict[str, float]:
    """Clips a second, and CPU seconds a clip, of the read function alone."""
    jobs = [pool.submit(_read_bare, plan, range(start, steps, CORES)) for start in range(CORES)]
    rates, costs = zip(*(job.result() for job in jobs), strict=True)
    return {"clips_per_second": sum(rates), "cpu_seconds_a_clip": statistics.mean(costs)}


def _read_bare(plan: Plan, steps: range) -> tuple[float, float]:
    torch.set_num_threads(1)
    read_slot(plan, steps[0], 0)
    started, cpu = time.perf_counter(), time.process_time()
    for step in steps:
        read_slot(plan, step, 0)
    clips = len(steps) * plan.clips_per_slot
    return clips / (time.perf_counter() - started), (time.process_time() - cpu) / clips


def _through_ray(plan: Plan, steps: range, *, num_streams: int) -> Iterator[SlotBatch]:
    return ray_slots(
        plan,
        steps,
        [0],
        prefetch=4,
        slots_per_task=1,
        cpus_per_task=TASK_CPUS,
        num_streams=num_streams,
        node_label=None,
        decode_seconds=120.0,
    )


def _through_ray_data(plan: Plan, steps: int, *, actors: bool) -> Iterator[Any]:
    """The same slots through Ray Data, in the plan's order, in one window: to compare with, nothing trains on it."""
    import ray.data
    from ray.data import ActorPoolStrategy, ExecutionOptions, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    reference = ray.put(plan)

    class Reader:
        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            batches = [read_slot(plan_of(reference), int(step), 0) for step in rows["id"]]
            return {"clips": np.stack([batch.clips for batch in batches])}

    # Actors leave room for the tasks that give them rows, or both wait for ever.
    how: dict[str, Any] = (
        {"compute": ActorPoolStrategy(size=CORES), "num_cpus": 0.5}
        if actors
        else {"compute": TaskPoolStrategy(), "num_cpus": TASK_CPUS}
    )
    work: Any = Reader if actors else Reader()
    dataset = ray.data.range(steps, override_num_blocks=steps).map_batches(work, batch_size=1, **how)
    dataset.context.execution_options = ExecutionOptions(preserve_order=True)
    dataset.context.enable_progress_bars = False
    return iter(dataset.iter_batches(batch_size=1, prefetch_batches=2, batch_format="numpy"))


def _rate(batches: Iterator[Any], plan: Plan, steps: int) -> dict[str, float]:
    """Clips a second and CPU seconds a clip after the first quarter, and the time until the first slot."""
    started, settled = time.perf_counter(), steps // 4
    arrivals, cpu = [], []
    for number, _ in enumerate(batches):
        # Looking at all processes takes as long as reading a clip: twice is enough.
        if number in (settled, steps - 1):
            cpu.append(_cpu_of_all())
        arrivals.append(time.perf_counter())
    clips = (steps - 1 - settled) * plan.clips_per_slot
    return {
        "clips_per_second": clips / (arrivals[-1] - arrivals[settled]),
        "cpu_seconds_a_clip": (cpu[1] - cpu[0]) / clips,
        "first_seconds": arrivals[0] - started,
    }


def _cpu_of_all() -> float:
    """CPU seconds so far of this process and of the whole Ray cluster below it: workers, raylet, head."""
    import ray

    assert ray.is_initialized()
    # Ray brings psutil along.
    import psutil

    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _direct_plan(config: Config, index: VideoIndex) -> Plan:
    settings = ("data.source=video", "data.stream_segment_seconds=4", "data.shuffle_segments=2", "optim.slots=1")
    return make_plan(load_config(config, *settings), streamed(config, index))


def _waits(plan: Plan, steps: int) -> dict[str, float]:
    """How long a rank that asks steadily, for less than the stream could give, waits for direct streaming.

    The segments are short, so that the steps cross many boundaries of pools and of epochs.
    """
    for _ in _through_ray(plan, range(WARM_STEPS), num_streams=1):
        pass
    rate = _rate(_through_ray(plan, range(steps), num_streams=1), plan, steps)["clips_per_second"]
    pause = plan.clips_per_slot / rate / DEMAND
    waits = []
    stream = _through_ray(plan, range(steps), num_streams=1)
    for _ in range(steps):
        started = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - started)
        time.sleep(pause)
    stream.close()
    later = waits[steps // 4 :]
    return {
        "direct_clips_per_second": rate,
        "direct_step_seconds": pause,
        "direct_mean_wait_seconds": statistics.mean(later),
        "direct_longest_wait_seconds": max(later),
    }


def _ranks(sizes: Sequence[int], num_slots: int) -> dict[str, Any]:
    """Clips a second of all ranks together, for several numbers of ranks: threads that do nothing but take slots."""
    config = load_config(
        "paper",
        *("clip.avoid_cuts=false", "data.source=video", "crops.clip_size=64", "data.short_side=96"),
        *("optim.clips_per_slot=8", "optim.slots=1", "data.shuffle_segments=1", "data.stream_segment_seconds=20"),
    )
    stored = load_config(config, "data.source=store")
    index = index_video(film(**SMALL_FILM, loops=3))
    rates = {}
    with tempfile.TemporaryDirectory() as store:
        plan = make_plan(stored, [write_store(index, decode_frames(index, stored), stored, store)])
        for size in sizes:
            rates[size] = _rate_of_ranks(plan, size, num_slots)
    return {f"clips_per_second_with_{size}_ranks": rate for size, rate in rates.items()}


def _rate_of_ranks(plan: Plan, size: int, num_slots: int) -> float:
    """After the first quarter. Ranks wait for each other at every step, as a training's do in its reduction."""
    each = max(FEWEST_SLOTS, num_slots // size)
    moments: list[float] = []
    step = threading.Barrier(size, action=lambda: moments.append(time.perf_counter()))

    def rank(number: int) -> None:
        for _ in _through_ray(plan, range(number * each, (number + 1) * each), num_streams=size):
            step.wait()

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(rank, range(size)))
    settled = each // 4
    return (each - 1 - settled) * size * plan.clips_per_slot / (moments[-1] - moments[settled])


def _memory_over_a_long_film() -> list[float]:
    """Peak memory, MB, of a process before and after 1, 2 and 3 thirds of 30 minutes of film streamed directly."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_stream_a_long_film).result()


def _stream_a_long_film() -> list[float]:
    torch.set_num_threads(1)
    index = index_video(film(**SMALL_FILM, loops=180))
    config = load_config("paper", "clip.avoid_cuts=false", "data.source=video", "data.short_side=180")
    config = load_config(config, "optim.slots=1", "crops.clip_size=64", "data.shuffle_segments=2")
    plan = make_plan(config, streamed(config, index))
    steps = plan.clips_per_epoch // plan.clips_per_slot
    keys = iter([(step, 0) for step in range(steps)])
    stream = local_slots(plan, keys, prefetch=4, num_threads=CORES, decode_seconds=120.0)
    peaks = [peak_mb()]
    for _ in range(3):
        for _ in itertools.islice(stream, steps // 3):
            pass
        peaks.append(peak_mb())
    return peaks
