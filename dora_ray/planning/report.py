"""Report of a plan: what a run needs, how long it takes on several clusters, and warnings."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dora_ray import files
from dora_ray.config import Config
from dora_ray.config_source import parse_yaml
from dora_ray.errors import ConfigError
from dora_ray.planning.figures import Figures, load_figures
from dora_ray.planning.model import (
    HOUR,
    Cluster,
    Estimate,
    Film,
    Workload,
    estimate,
    ingest_core_seconds,
    split_finer,
    store_bytes,
)
from dora_ray.planning.workload import film_of, workload_of
from dora_ray.training.launch import Checked
from dora_ray.training.memory import MB, estimate_memory_mb

GB, GIB = 1e9, 2**30
GPU_COUNTS = (1, 8, 64, 1024)
# Beyond this many epochs, the model memorizes a film; the paper's runs show theirs 100 times.
MANY_EPOCHS = 1000
# Memory of a training process besides its tensors: Python, torch, Ray.
PROCESS_BYTES = 1.2 * GIB
PRICES = ("currency", "gpu_hour", "cpu_hour", "storage_gb_month")
HOURS_A_MONTH = 730
SHOWN_VIDEOS = 5
LIMITS = {
    "training": "the workers' arithmetic",
    "reading": "reading clips: more --cpus",
    "network": "the training nodes' network",
    "head": "the head, which hands out slots",
}


@dataclass(frozen=True)
class Question:
    """Question about a recipe.

    Attributes:
        cluster: the machines.
        node_bytes: memory of a training node.
        gpu_bytes: memory of a GPU; None if unknown.
        prices: prices by the names in PRICES; empty: no cost is computed.
    """

    cluster: Cluster
    node_bytes: float
    gpu_bytes: float | None
    prices: Mapping[str, Any]


def load_prices(path: str) -> dict[str, Any]:
    """Return the prices of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        found = parse_yaml(files.read_text(path), path)
    except OSError as error:
        raise ConfigError(f"--price-file {path} cannot be read: {error.strerror or error}") from error
    unknown = set(found) - set(PRICES)
    wrong = [name for name in PRICES[1:] if not isinstance(found.get(name, 0.0), int | float)]
    if unknown or wrong:
        raise ConfigError(
            f"--price-file {path}: {', '.join(sorted(unknown) + wrong)} is not understood; allowed are currency (a "
            "word) and, as numbers, gpu_hour, cpu_hour (a core), storage_gb_month"
        )
    return dict(found)


def this_machine() -> float:
    """Return the memory of this machine in bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def gpu_memory() -> float | None:
    """Return the memory of the smallest local GPU in bytes; None without a GPU."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return float(min(sizes)) if sizes else None


def plan_of(config: Config, films: Sequence[Film], figures: Figures, question: Question) -> dict[str, Any]:
    """Return the whole plan as plain values."""
    work, cluster = workload_of(config, films), question.cluster
    counts = sorted({cluster.workers, *(GPU_COUNTS if cluster.gpus else ())})
    rows = [
        _row(split, figures, replace(cluster, workers=count), question)
        for count in counts
        for split in (work, *([split_finer(work, count)] if count > work.slots and cluster.gpus else ()))
    ]
    asked = next(row for row in rows if row["workers_asked"] == cluster.workers)
    memory = _memory(config, question)
    return {
        "films": [asdict(film) for film in films],
        "store_gb": store_bytes(work, figures.rates) / GB,
        "ingest_core_hours": ingest_core_seconds(work, figures.rates) / HOUR,
        "ingest_hours": ingest_core_seconds(work, figures.rates) / HOUR / cluster.cores,
        "kept_frames": work.kept_frames,
        "steps": work.steps,
        "clips_per_step": work.clips_per_step,
        "epochs": work.epochs,
        "tflop_per_clip": work.tflop_per_clip,
        "checkpoint_gb": work.checkpoint_bytes / GB,
        **memory,
        "asked": asked,
        "rows": rows,
        "warnings": _warnings(work, asked, memory, cluster),
        "rates": asdict(figures.rates),
        "origins": figures.origins,
    }


def _row(work: Workload, figures: Figures, cluster: Cluster, question: Question) -> dict[str, Any]:
    found: Estimate = estimate(work, figures.rates, cluster)
    return {
        "workers_asked": cluster.workers,
        "slots": work.slots,
        "clips_per_slot": work.clips_per_slot,
        **asdict(found),
        "checkpoint_gb_an_hour": found.checkpoint_bytes_per_hour / GB,
        "cost": _cost(work, figures, cluster, found.hours, question.prices),
    }


def _cost(work: Workload, figures: Figures, cluster: Cluster, hours: float, prices: Mapping[str, Any]) -> float | None:
    """Return the cost of the run, and of its store for the same time; idle machines cost, too."""
    if not prices or math.isinf(hours):
        return None
    gpus = cluster.workers * prices.get("gpu_hour", 0.0) if cluster.gpus else 0.0
    cores = cluster.cores * prices.get("cpu_hour", 0.0)
    ingest = ingest_core_seconds(work, figures.rates) / HOUR * prices.get("cpu_hour", 0.0)
    kept = store_bytes(work, figures.rates) / GB * prices.get("storage_gb_month", 0.0) * hours / HOURS_A_MONTH
    return float((gpus + cores) * hours + ingest + kept)


def _memory(config: Config, question: Question) -> dict[str, Any]:
    """Return the memory of a worker's tensors, and of all workers of a node with what the node has."""
    sizes = estimate_memory_mb(config, half=question.cluster.gpus and config.optim.precision == "bf16")
    tensors, snapshot = sizes["total"] * MB, sizes["snapshot"] * MB
    here = min(question.cluster.workers, config.optim.slots, question.cluster.workers_per_node)
    each = PROCESS_BYTES + (snapshot if question.cluster.gpus else tensors)
    return {
        "worker_gib": tensors / GIB,
        "node_needs_gib": here * each / GIB,
        "node_workers": here,
        "node_has_gib": question.node_bytes / GIB,
        "gpu_needs_gib": (tensors - snapshot) / GIB if question.cluster.gpus else 0.0,
        "gpu_has_gib": question.gpu_bytes / GIB if question.gpu_bytes else math.inf,
    }


def _warnings(work: Workload, asked: dict[str, Any], memory: dict[str, Any], cluster: Cluster) -> list[str]:
    """Return sentences about what will fail or waste resources."""
    found = []
    if memory["node_needs_gib"] > memory["node_has_gib"]:
        found.append(
            f"a node's workers ({memory['node_workers']}) need {memory['node_needs_gib']:.1f} GiB, and it has "
            f"{memory['node_has_gib']:.1f} GiB: lower optim.clips_per_slot (and raise optim.slots), set "
            "optim.activation_checkpointing=true, or run fewer workers a node"
        )
    if memory["gpu_needs_gib"] > memory["gpu_has_gib"]:
        found.append(
            f"a worker's tensors take {memory['gpu_needs_gib']:.1f} GiB of its GPU, and that has "
            f"{memory['gpu_has_gib']:.1f} GiB: lower optim.clips_per_slot (and raise optim.slots), or set "
            "optim.activation_checkpointing=true"
        )
    if work.epochs > MANY_EPOCHS:
        seconds = sum(film.seconds for film in work.films)
        found.append(
            f"{work.epochs:,.0f} epochs of {seconds:,.0f} s of video: the same pictures are repeated. Add videos, or "
            "lower optim.steps"
        )
    if asked["used_workers"] < cluster.workers:
        kind = "GPUs" if cluster.gpus else "workers"
        found.append(
            f"{cluster.workers - asked['used_workers']} of {cluster.workers} {kind} idle: a step has optim.slots="
            f"{work.slots} slots"
        )
    elif work.slots % asked["used_workers"]:
        rounds = math.ceil(work.slots / asked["used_workers"])
        found.append(
            f"{work.slots} slots on {asked['used_workers']} workers take {rounds} rounds, the last one partly idle: "
            "use a number of workers that divides optim.slots"
        )
    if math.isinf(asked["hours"]):
        found.append("interruptions come faster than recoveries: the run never finishes; use fewer or calmer nodes")
    return found


def short_form(plan: Mapping[str, Any]) -> str:
    """Return the short lines of `train --dry-run`."""
    asked = plan["asked"]
    lines = [
        f"store       {plan['kept_frames']:,} frames, {plan['store_gb']:.3g} GB; ingest about "
        f"{_time(plan['ingest_hours'])}",
        f"training    {plan['steps']:,} steps of {plan['clips_per_step']} clips, {_count(plan['epochs'])} epochs: "
        f"about {_time(asked['hours'])} at {asked['clips_per_second']:.3g} clips/s",
        f"limit       {LIMITS[asked['limit']]}",
        f"memory      {plan['worker_gib']:.1f} GiB of tensors a worker",
        f"checkpoint  {plan['checkpoint_gb']:.2g} GB, {asked['checkpoint_gb_an_hour']:.3g} GB an hour",
    ]
    return "\n".join(lines + [f"WARNING     {warning}" for warning in plan["warnings"]])


def dry_run(config: Config, checked: Checked) -> str:
    """Return what `train` would do on this machine, or on the cluster at RAY_ADDRESS."""
    gpus = torch.cuda.device_count()
    use_gpu = gpus >= 1 if config.cluster.use_gpu is None else config.cluster.use_gpu
    workers = config.cluster.num_workers
    cores = float(os.cpu_count() or 1)
    cluster = Cluster(config.max_workers, use_gpu, cores, workers_per_node=config.max_workers)
    films = [film_of(index) for index in checked.indexes]
    plan = plan_of(config, films, load_figures(), Question(cluster, this_machine(), gpu_memory(), {}))
    videos = [
        f"video       {index.path} ({index.width}x{index.height}, {index.codec}, {index.real_seconds:.1f} s)"
        for index in checked.indexes
    ]
    count = "in this process" if workers == 0 else f"{workers}" if isinstance(workers, int) else f"{list(workers)}"
    cpus = config.max_workers * config.cluster.cpus_per_worker + config.cluster.decode_cpus
    return "\n".join(
        [
            f"run         {checked.run}",
            *([] if checked.given is None else [f"weights     {checked.given}"]),
            f"store       {checked.store}",
            *(videos if len(videos) <= SHOWN_VIDEOS else [*videos[:SHOWN_VIDEOS], f"            {len(videos)} in all"]),
            f"workers     {count}, {'a GPU each' if use_gpu else 'without GPUs'}; with decoding {cpus:g} CPUs of Ray",
            short_form(plan),
            "Nothing was written. `dora-ray config` prints the configuration, `dora-ray plan` other clusters.",
        ]
    )


def long_form(plan: Mapping[str, Any], cluster: Cluster, *, taken: Sequence[str], currency: str) -> str:
    """Return the whole plan as text.

    Args:
        plan: result of `plan_of`.
        cluster: cluster of the plan.
        taken: options that were not given and default to this machine.
        currency: currency of the costs.
    """
    films = [
        f"film        {_time(film['seconds'] / HOUR)}, {film['width']}x{film['height']}, "
        f"{film['frames_per_second']:.4g} frames/s, {film['codec']}"
        for film in plan["films"]
    ]
    return "\n".join(
        [
            *films,
            *_machines(plan, cluster, taken),
            short_form(plan),
            "",
            "The same run on other cluster sizes. `used`: workers that get a slot. `cores`: cores that read as "
            "fast as the",
            "workers train. Rows with more slots split the same batch finer (optim.slots x optim.clips_per_slot): "
            "another run.",
            *_table(plan, cluster, currency),
            "",
            "The rates behind it:",
            *_origins(plan),
        ]
    )


def _machines(plan: Mapping[str, Any], cluster: Cluster, taken: Sequence[str]) -> list[str]:
    """Return lines about the cluster: size, guessed values, and rates that were never measured."""
    kind = "GPU" if cluster.gpus else "worker"
    count = f"{cluster.workers:,} {kind}{'s' * (cluster.workers > 1)}"
    lost = "no interruptions (--interruptions N an hour, of spot nodes)"
    if cluster.interruptions:
        share = plan["asked"]["lost_share"]
        lost = f"{cluster.interruptions:g} interruptions a node and hour, which take {share:.1%} of the time"
    lines = [
        f"machines    {count}, {min(cluster.workers, cluster.workers_per_node)} a node; {cluster.cores:g} cores for "
        f"reading in all; a node needs {plan['node_needs_gib']:.1f} of {plan['node_has_gib']:.1f} GiB",
        f"            {lost}",
    ]
    if taken:
        lines.append(f"            {' and '.join(taken)} not given: this machine's were taken")
    assumed = [name for name, origin in plan["origins"].items() if origin.startswith("assumed")]
    if cluster.gpus and assumed:
        lines.append(f"            NOT MEASURED: {', '.join(assumed)}; the hours are no better than these (below)")
    return lines


def _table(plan: Mapping[str, Any], cluster: Cluster, currency: str) -> list[str]:
    head = f"{'GPUs' if cluster.gpus else 'workers':>8} {'used':>5} {'slots':>9} {'s/step':>8} "
    head += f"{'clips/s':>9} {'hours':>9} {'cores':>7}"
    money = any(row["cost"] is not None for row in plan["rows"])
    table = [head + f" {'lost':>6}" + (f" {currency:>11}" if money else "") + "  limited by"]
    for row in plan["rows"]:
        cost = f" {row['cost']:>11,.0f}" if row["cost"] is not None else " " * 12 if money else ""
        table.append(
            f"{row['workers_asked']:>8,} {row['used_workers']:>5} {_slots(row):>9} {row['step_seconds']:>8.3g} "
            f"{row['clips_per_second']:>9,.4g} {row['hours']:>9,.4g} {row['read_cores']:>7.3g} "
            f"{row['lost_share']:>6.1%}{cost}  {_limit(row)}"
        )
    return table


def _origins(plan: Mapping[str, Any]) -> list[str]:
    """List the rates with their values, grouped by origin."""
    origins: dict[str, list[str]] = {}
    for name, origin in plan["origins"].items():
        origins.setdefault(origin, []).append(f"{name} {_value(plan['rates'][name])}")
    return [line for origin, names in origins.items() for line in (f"  {', '.join(names)}", f"    {origin}")]


def _value(rate: float | Mapping[str, float]) -> str:
    if isinstance(rate, Mapping):
        return "(" + ", ".join(f"{name} {value:.3g}" for name, value in rate.items()) + ")"
    return f"{rate:.4g}"


def _slots(row: Mapping[str, Any]) -> str:
    return f"{row['slots']} x {row['clips_per_slot']}"


def _limit(row: Mapping[str, Any]) -> str:
    idle = row["workers_asked"] - row["used_workers"]
    return LIMITS[row["limit"]] + (f"; {idle:,} idle, there are {row['slots']} slots" if idle else "")


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _time(hours: float) -> str:
    if math.isinf(hours):
        return "for ever"
    if hours < 1 / 60:
        return f"{hours * HOUR:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h"
