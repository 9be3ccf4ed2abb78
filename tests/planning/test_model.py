"""Arithmetic of the model, compared with step-by-step simulations of its closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dora_ray.planning.model import (
    Cluster,
    Film,
    Rates,
    Workload,
    estimate,
    ingest_core_seconds,
    read_core_seconds,
    split_finer,
    store_bytes,
)

RATES = Rates(
    decoded_pixels={"h264": 1e9, "other": 5e8},
    kept_pixel_seconds=2e-9,
    stored_bytes_a_pixel=0.15,
    read_pixel_seconds=4e-9,
    slot_seconds=0.02,
    head_slots=100.0,
    gpu_tflop=100.0,
    core_tflop=0.05,
    bus_bytes=2e10,
    network_bytes=1e9,
    drain_seconds=10.0,
    kill_seconds=20.0,
)
WORK = Workload(
    films=(Film(600.0, 1920, 1080, 30.0, "h264"),),
    kept_frames=3600,
    stored_pixels=910 * 512,
    steps=1000,
    slots=8,
    clips_per_slot=16,
    frames=8,
    clip_bytes=2_160_000,
    tflop_per_clip=1.0,
    checkpoint_bytes=10**9,
    sum_bytes=4 * 10**8,
    checkpoint_seconds=60.0,
)


def test_store_and_ingest_by_hand():
    assert store_bytes(WORK, RATES) == pytest.approx(3600 * 910 * 512 * 0.15)
    decoding = 600 * 30 * 1920 * 1080 / 1e9
    assert ingest_core_seconds(WORK, RATES) == pytest.approx(decoding + 3600 * 910 * 512 * 2e-9)
    unknown = replace(WORK, films=(replace(WORK.films[0], codec="prores"),))
    assert ingest_core_seconds(unknown, RATES) - ingest_core_seconds(WORK, RATES) == pytest.approx(decoding)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 7, 8])
def test_a_step_ends_with_its_busiest_worker(workers):
    """Deal slots one after the other, as in training; nothing else limits."""
    free = replace(RATES, bus_bytes=math.inf, network_bytes=math.inf, head_slots=math.inf)
    busy = np.zeros(workers)
    for slot in range(WORK.slots):
        busy[slot % workers] += WORK.clips_per_slot * WORK.tflop_per_clip / RATES.gpu_tflop
    found = estimate(WORK, free, Cluster(workers, True, cores=1e9))
    assert found.step_seconds == pytest.approx(busy.max())
    assert found.limit == "training"


def test_reading_is_a_pipeline_that_the_slower_end_paces():
    """Cores read slots one after the other into a queue, from which each step takes all of its slots."""
    each = read_core_seconds(WORK, RATES) * WORK.clips_per_slot
    rates = replace(RATES, network_bytes=math.inf)
    training = estimate(WORK, rates, Cluster(8, True, cores=1e9)).parts["training"]
    for cores in (1, 2, 8, 64):
        free = np.zeros(cores)
        begun = ended = 0.0
        steps = 200
        for _ in range(steps):
            for _ in range(WORK.slots):
                core = free.argmin()
                free[core] += each
                begun = max(begun, free[core])
            ended = max(ended, begun) + training
        found = estimate(WORK, rates, Cluster(8, True, cores=cores))
        assert ended / steps == pytest.approx(found.step_seconds, rel=0.03)
        assert found.limit == ("reading" if cores < found.read_cores else "training")


@pytest.mark.parametrize(("announced", "interruptions"), [(1.0, 0.5), (0.5, 0.5), (0.0, 2.0)])
def test_interruptions_stretch_the_run_as_a_simulation_of_them_does(announced, interruptions):
    cluster = Cluster(8, True, 1e6, workers_per_node=2, interruptions=interruptions, announced=announced)
    work = replace(WORK, steps=2_000_000)
    found = estimate(work, RATES, cluster)
    needed, rng = work.steps * found.step_seconds, np.random.default_rng(0)
    clock = done = committed = 0.0
    nodes, next_checkpoint = 4, work.checkpoint_seconds
    strike = rng.exponential(3600 / (nodes * interruptions))
    while done < needed:
        span = min(next_checkpoint - (done - committed), needed - done, strike - clock)
        clock, done = clock + span, done + span
        if clock >= strike - 1e-9:
            if rng.random() >= announced:  # without a notice: back to the checkpoint
                clock, done = clock + RATES.kill_seconds, committed
            else:
                clock, committed = clock + RATES.drain_seconds, done
            strike = clock + rng.exponential(3600 / (nodes * interruptions))
        elif done - committed >= next_checkpoint - 1e-9:
            committed = done
    assert found.lost_share == pytest.approx(1 - needed / clock, rel=0.12)
    assert found.hours * 3600 == pytest.approx(clock, rel=0.02)


def test_a_run_that_never_ends_is_a_warning():
    found = estimate(WORK, RATES, Cluster(8, True, 64, workers_per_node=1, interruptions=60.0))
    assert math.isinf(found.hours)


def test_bottlenecks_of_1_to_1024_gpus():
    def limit(workers: int, work: Workload = WORK, **rates: float) -> str:
        return estimate(work, replace(RATES, **rates), Cluster(workers, True, cores=1e6)).limit

    assert limit(1) == "training"
    assert limit(8, network_bytes=1e8) == "network"
    assert limit(128, split_finer(WORK, 1024), gpu_tflop=1e6) == "head"
    assert estimate(WORK, RATES, Cluster(1024, True, cores=1e6)).used_workers == 8


def test_the_same_batch_in_more_slots():
    for workers, slots in ((9, 8), (64, 64), (100, 64), (1024, 128)):
        split = split_finer(WORK, workers)
        assert (split.slots, split.clips_per_step) == (slots, 128)


def test_on_cpus_reading_and_training_share_the_cores():
    two = estimate(WORK, RATES, Cluster(2, False, cores=2))
    four = estimate(WORK, RATES, Cluster(4, False, cores=2))
    assert four.step_seconds == two.step_seconds, "more workers than cores gain nothing"
    alone = 128 * 1.0 / (0.05 * 2)
    assert two.step_seconds == pytest.approx(alone + 128 * read_core_seconds(WORK, RATES) / 2)
