"""Model of a run: from workload, cluster and measured rates to seconds per step, hours, and the bottleneck.

A step is as slow as the slowest of four concurrent activities: training, reading clips, transferring them to the
training nodes, and handing out slots on the head. Interruptions stretch the total. Pure arithmetic; docs/scale.md
derives its terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

HOUR = 3600.0


@dataclass(frozen=True)
class Film:
    """One video: length, frame size in pixels, frame rate, codec."""

    seconds: float
    width: int
    height: int
    frames_per_second: float
    codec: str

    @property
    def pixels(self) -> float:
        """Pixels of all frames."""
        return self.seconds * self.frames_per_second * self.width * self.height


@dataclass(frozen=True)
class Workload:
    """Work of a recipe on its films.

    Attributes:
        films: the videos.
        kept_frames: frames that the store keeps.
        stored_pixels: pixels of a stored frame.
        steps, slots, clips_per_slot: of the recipe.
        frames: frames of a clip.
        clip_bytes: bytes of a clip sent to a training worker.
        tflop_per_clip: TFLOP of matrix products of a training step, per clip.
        checkpoint_bytes: size of one checkpoint.
        sum_bytes: bytes that workers all-reduce in a step.
        checkpoint_seconds: time between checkpoints.
    """

    films: tuple[Film, ...]
    kept_frames: int
    stored_pixels: int
    steps: int
    slots: int
    clips_per_slot: int
    frames: int
    clip_bytes: int
    tflop_per_clip: float
    checkpoint_bytes: int
    sum_bytes: int
    checkpoint_seconds: float

    @property
    def clips_per_step(self) -> int:
        """Clips of a global batch."""
        return self.slots * self.clips_per_slot

    @property
    def epochs(self) -> float:
        """Number of times that the run visits every possible clip start."""
        return self.steps * self.clips_per_step / max(1, self.kept_frames)


@dataclass(frozen=True)
class Rates:
    """Measured or assumed rates; `figures.json` gives the origin of each.

    Attributes:
        decoded_pixels: pixels decoded per core-second, by codec; `other` for codecs that are not listed.
        kept_pixel_seconds: core-seconds of a kept frame's JPEG and write, per stored pixel.
        stored_bytes_a_pixel: JPEG bytes per stored pixel.
        read_pixel_seconds: core-seconds of reading and cropping a clip, per stored pixel of its frames.
        slot_seconds: core-seconds of Ray's overhead per slot.
        head_slots: slots per second that one head hands out.
        gpu_tflop: TFLOP per second of a training step on one GPU.
        core_tflop: the same on one core.
        bus_bytes: bytes per second between the GPUs of a node.
        network_bytes: bytes per second between nodes.
        drain_seconds, kill_seconds: time from a notice, or a death, to the next step.
    """

    decoded_pixels: dict[str, float]
    kept_pixel_seconds: float
    stored_bytes_a_pixel: float
    read_pixel_seconds: float
    slot_seconds: float
    head_slots: float
    gpu_tflop: float
    core_tflop: float
    bus_bytes: float
    network_bytes: float
    drain_seconds: float
    kill_seconds: float


@dataclass(frozen=True)
class Cluster:
    """Machines of a run.

    Attributes:
        workers: training workers; with `gpus`, one per GPU.
        gpus: workers have GPUs; otherwise they share the cores with reading.
        cores: cores that read and decode.
        workers_per_node: workers of a node, which share its network and its interruptions.
        interruptions: interruptions per node and hour.
        announced: share of the interruptions with a notice, which lose no step.
    """

    workers: int
    gpus: bool
    cores: float
    workers_per_node: int = 8
    interruptions: float = 0.0
    announced: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run on a cluster.

    Attributes:
        used_workers: at most the number of slots.
        step_seconds: seconds of the whole step; `parts` lists its concurrent activities.
        limit: name of the slowest part.
        clips_per_second: rate of the whole cluster.
        read_cores: cores at which reading is as fast as training.
        lost_share: share of the time lost to interruptions.
        hours: time to the last step; infinite if interruptions come faster than recoveries.
        checkpoint_bytes_per_hour: bytes written per hour.
    """

    used_workers: int
    step_seconds: float
    parts: dict[str, float] = field(repr=False)
    limit: str
    clips_per_second: float
    read_cores: float
    lost_share: float
    hours: float
    checkpoint_bytes_per_hour: float


def split_finer(work: Workload, workers: int) -> Workload:
    """Split the same batch into the most slots, at most one per worker, that divide it evenly."""
    batch = work.clips_per_step
    slots = max(count for count in range(1, min(workers, batch) + 1) if batch % count == 0)
    return replace(work, slots=slots, clips_per_slot=batch // slots)


def store_bytes(work: Workload, rates: Rates) -> float:
    """Return the size of the frame store."""
    return work.kept_frames * work.stored_pixels * rates.stored_bytes_a_pixel


def ingest_core_seconds(work: Workload, rates: Rates) -> float:
    """Return the core-seconds of decoding every film once, and of encoding and writing the kept frames."""
    decoded = sum(film.pixels / _decoded(film.codec, rates) for film in work.films)
    return decoded + work.kept_frames * work.stored_pixels * rates.kept_pixel_seconds


def _decoded(codec: str, rates: Rates) -> float:
    return rates.decoded_pixels.get(codec, rates.decoded_pixels["other"])


def read_core_seconds(work: Workload, rates: Rates) -> float:
    """Return the core-seconds of reading one clip, including its part of Ray's overhead per slot."""
    return work.frames * work.stored_pixels * rates.read_pixel_seconds + rates.slot_seconds / work.clips_per_slot


def estimate(work: Workload, rates: Rates, cluster: Cluster) -> Estimate:
    """Estimate a run."""
    workers = min(cluster.workers, work.slots)
    reading = work.clips_per_step * read_core_seconds(work, rates)
    training = _training_seconds(work, rates, cluster, workers)
    nodes = math.ceil(workers / cluster.workers_per_node)
    parts = {
        "training": training,
        "reading": reading / cluster.cores,
        "network": work.clips_per_step * work.clip_bytes / (nodes * rates.network_bytes),
        "head": work.slots / rates.head_slots,
    }
    if not cluster.gpus:  # the same cores do both
        parts["training"] += parts.pop("reading")
    limit = max(parts, key=lambda name: parts[name])
    step = parts[limit]
    lost = _lost_share(work, rates, cluster, nodes)
    return Estimate(
        used_workers=workers,
        step_seconds=step,
        parts=parts,
        limit=limit,
        clips_per_second=work.clips_per_step / step,
        read_cores=reading / training,
        lost_share=lost,
        hours=work.steps * step / (1 - lost) / HOUR if lost < 1 else math.inf,
        checkpoint_bytes_per_hour=work.checkpoint_bytes * HOUR / max(step, work.checkpoint_seconds),
    )


def _training_seconds(work: Workload, rates: Rates, cluster: Cluster, workers: int) -> float:
    """Return the seconds of the busiest worker's slots and of the all-reduce; on CPUs, all workers share the cores."""
    if not cluster.gpus:
        return work.clips_per_step * work.tflop_per_clip / (rates.core_tflop * min(workers, cluster.cores))
    rounds, here = math.ceil(work.slots / workers), min(workers, cluster.workers_per_node)
    nodes = math.ceil(workers / cluster.workers_per_node)
    # A ring all-reduce makes two passes, first within every node, then between nodes.
    within = 2 * (here - 1) / here * work.sum_bytes / rates.bus_bytes
    between = 2 * (nodes - 1) / nodes * work.sum_bytes / rates.network_bytes
    return rounds * work.clips_per_slot * work.tflop_per_clip / rates.gpu_tflop + within + between


def _lost_share(work: Workload, rates: Rates, cluster: Cluster, nodes: int) -> float:
    """Return the share of time lost to recoveries and to repeated steps."""
    again = work.checkpoint_seconds / 2
    unannounced = (1 - cluster.announced) * (rates.kill_seconds + again)
    each = cluster.announced * rates.drain_seconds + unannounced
    return min(1.0, nodes * cluster.interruptions * each / HOUR)
