"""Memory growth over a long stream of small slots, for every process of the cluster by role.

`python -m dora_ray.bench.growth SLOTS [SLOTS_A_TASK]` prints a table; `dora-ray bench stream` runs a shorter one.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dora_ray.bench.cluster import cluster, memory_by_role
from dora_ray.bench.films import film, film_inputs
from dora_ray.config import load_config
from dora_ray.training.inputs import Inputs

FILM: dict[str, Any] = {"width": 320, "height": 180, "frames_per_second": 24, "seconds": 10, "group_size": 48}
SLOTS_PER_TASK = 16
SAMPLE_SECONDS = 5.0
# Process start and cache warm-up do not count as growth.
SETTLED_SHARE = 0.2
MILLION = 1e6


@dataclass
class Growth:
    """Samples of every process's memory over a stream.

    Attributes:
        slots: slots taken at each sample.
        memory: MB of each role's largest process.
    """

    slots: list[int] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)

    def sample(self, slots: int) -> None:
        """Sample the memory of all processes."""
        self.slots.append(slots)
        self.memory.append({role: max(sizes) for role, sizes in memory_by_role().items()})

    def roles(self) -> dict[str, dict[str, float]]:
        """Return for each role the MB when settled, at the end and at most, and the slope in MB per million slots."""
        settled = int(np.searchsorted(self.slots, SETTLED_SHARE * self.slots[-1]))
        found = {}
        for role in sorted({role for sample in self.memory for role in sample}):
            kept = [(n, sample[role]) for n, sample in zip(self.slots, self.memory, strict=True) if role in sample]
            kept = [pair for pair in kept if pair[0] >= self.slots[settled]]
            if len(kept) < 2 or kept[0][0] == kept[-1][0]:
                continue
            x, y = np.array(kept, float).T
            slope = float(np.polyfit(x, y, 1)[0])
            figures = {"settled_mb": y[0], "end_mb": y[-1], "most_mb": y.max(), "mb_a_million_slots": MILLION * slope}
            found[role] = {name: float(value) for name, value in figures.items()}
        return found


def small_inputs(store: str) -> Inputs:
    """Return inputs whose slots take about a millisecond to read."""
    words = ("clip.avoid_cuts=false", "clip.num_frames=2", "crops.clip_size=32", "data.short_side=64")
    config = load_config("paper", *words, "optim.clips_per_slot=1", "optim.slots=8")
    return film_inputs(config, film(**FILM), store)


def measure(inputs: Inputs, slots: int, *, slots_per_task: int = SLOTS_PER_TASK) -> tuple[Growth, float]:
    """Consume a stream's slots as one rank would; return the samples and slots per second."""
    import ray

    from dora_ray.clips.dataset import StreamSettings, deal, make_clips
    from dora_ray.clips.rank_stream import RankStream

    steps = slots // inputs.plan.slots
    settings = StreamSettings(
        run=uuid.uuid4().hex,
        num_steps=steps,
        slots_per_task=slots_per_task,
        prefetch=max(1, 4 // slots_per_task),
        decode_cpus=0.5,
        decode_label=None,
        decode_seconds=120.0,
    )
    reference = (ray.put(inputs.contents),)
    growth, done, end = Growth(), 0, threading.Event()

    def look() -> None:
        while not end.wait(SAMPLE_SECONDS):
            growth.sample(done)

    watch = threading.Thread(target=look)
    stream = RankStream(
        deal(make_clips(reference, settings), 1)[0],
        inputs.plan,
        settings,
        rank=0,
        size=1,
        new_shard=lambda: deal(make_clips(reference, settings), 1)[0],
    )
    watch.start()
    started = time.perf_counter()
    try:
        stream.start(0)
        for batches in stream.steps(0):
            done += len(batches)
    finally:
        end.set()
        watch.join()
    growth.sample(done)
    return growth, done / (time.perf_counter() - started)


def main(slots: int, slots_per_task: int = SLOTS_PER_TASK) -> None:
    """Measure, and print the table."""
    with tempfile.TemporaryDirectory() as store, cluster():
        growth, rate = measure(small_inputs(store), slots, slots_per_task=slots_per_task)
    sys.stdout.write(f"{growth.slots[-1]:,} slots, {slots_per_task} a task, {rate:.0f} slots/s; MB\n")
    sys.stdout.write(f"{'process':28} {'settled':>9} {'end':>9} {'most':>9} {'a million slots':>16}\n")
    for role, figures in growth.roles().items():
        sys.stdout.write(f"{role:28} " + "{:9.1f} {:9.1f} {:9.1f} {:16.1f}\n".format(*figures.values()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
