"""Forecast of a sweep: trials, workers, disk space, and time from steps measured on this machine."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dora_ray import files
from dora_ray.config import Config
from dora_ray.progress import Progress
from dora_ray.training.graph import WARM_UP_CALLS
from dora_ray.training.inputs import check_videos
from dora_ray.training.memory import MB, estimate_memory_mb
from dora_ray.training.numerics import prepare_torch
from dora_ray.training.step import apply_step, has_graph, initial_state, sum_slots
from dora_ray.tuning.axes import SEED_KEY
from dora_ray.tuning.capacity import largest, trials_that_fit
from dora_ray.tuning.data import distinct_data, place, tours
from dora_ray.tuning.results import trial_status
from dora_ray.tuning.space import SweepSpec, Trial, base_config, expand, load_sweep, make_trial
from dora_ray.tuning.sweep import check_folder, known_trials
from dora_ray.video.tour_files import FILM

# Number of points to measure a step of, evenly spaced: a step's cost depends on the varied settings.
MEASURED_POINTS = 4
# Bytes per pixel of JPEG at the store's quality, measured on the demo's streets.
JPEG_BYTES = 0.2
ASPECT = 16 / 9


def forecast(
    source: str | Path | Mapping[str, Any],
    *overrides: str,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run the checks of `sweep` and forecast its cost, without writing anything.

    Returns:
        Label -> value, for printing: number of trials, points and seeds; resources per trial; concurrent trials on this
        machine; measured seconds per step (fastest and slowest point); total time, without startup and evaluations;
        disk space of checkpoints and frames.
    """
    folder = files.absolute(out if out is not None else "runs/sweep-<time>")
    spec = load_sweep(source, *overrides)
    check_folder(folder, spec, resume=resume)
    base = place(base_config(spec), spec, folder)
    trials = [make_trial(base, trial.values) for trial in expand(spec)]
    videos = sum(_store_bytes(config, spec, folder) for config in distinct_data([trial.config for trial in trials]))
    done = [trial.name for trial in known_trials(folder, spec, base, trials) if _is_done(folder, trial)]
    need = largest([trial.config for trial in trials])
    here = [{"CPU": max(os.cpu_count() or 1, need.cpus), "GPU": torch.cuda.device_count()}]
    at_a_time = max(1, min(trials_that_fit(here, need), spec.max_concurrent_trials or spec.count, spec.count))
    seconds = _measured([trial.config for trial in _spread(trials)])
    left = spec.count - len(done)
    mean = sum(seconds) / len(seconds)
    total = left * base.optim.steps * mean / max(1, need.workers) / at_a_time
    snapshot = max(estimate_memory_mb(trial.config, half=False)["snapshot"] for trial in trials)
    return {
        "sweep": folder,
        "trials": spec.count,
        "already done": len(done),
        "points": spec.count // len(spec.seeds),
        "seeds": list(spec.seeds),
        "workers per trial": need.workers or "its driver",
        "CPUs per trial": need.cpus,
        "GPUs per trial": need.worker.get("GPU", 0) * max(1, need.workers),
        "concurrent trials": f"{at_a_time} on this machine",
        "steps per trial": base.optim.steps,
        "seconds per step": f"{min(seconds):.3g} to {max(seconds):.3g}, measured here on {len(seconds)} points",
        "time": f"{datetime.timedelta(seconds=round(total))}, plus startup and evaluations of {left} trials",
        "disk": f"{snapshot * base.run.keep_checkpoints * spec.count:,.0f} MB of checkpoints, {videos / MB:,.0f} MB "
        f"of frames in {base.data.store}",
    }


def _is_done(folder: str, trial: Trial) -> bool:
    return trial_status(folder, trial.name) in ("done", "stopped")


def _store_bytes(config: Config, spec: SweepSpec, folder: str) -> float:
    """Return the bytes of frames that a store would hold."""
    own = {files.join(path, FILM): length for path, length, _ in tours(spec, folder)}
    if unmade := [own[path] for path in config.data.videos if path in own and not files.exists(path)]:
        seconds = sum(unmade)
    else:
        seconds = sum(index.shown_seconds for index in check_videos(config))
    return seconds * config.data.frames_per_second * config.data.short_side**2 * ASPECT * JPEG_BYTES


def _spread(trials: Sequence[Trial]) -> list[Trial]:
    """Return a few evenly spaced points, with one seed each."""
    first = trials[0].values[SEED_KEY]
    points = [trial for trial in trials if trial.values[SEED_KEY] == first]
    step = max(1, (len(points) - 1) // (MEASURED_POINTS - 1)) if len(points) > 1 else 1
    return points[::step][:MEASURED_POINTS]


def _measured(configs: Sequence[Config]) -> list[float]:
    """Return the seconds per step of each configuration; show progress, as a large network takes minutes."""
    with Progress("measure", unit="points") as progress:
        seconds = list[float]()
        for config in configs:
            progress.update(step=len(seconds), total=len(configs))
            seconds.append(step_seconds(config))
        progress.update(step=len(seconds), total=len(configs))
    return seconds


def step_seconds(config: Config) -> float:
    """Return the seconds of one step with all its slots on one device of this machine: the best after a warm-up.

    The clips are noise in memory, so the time to read clips during training is not included.
    """
    device = torch.device("cuda" if config.cluster.use_gpu is not False and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.cluster.threads_per_worker)
    prepare_torch(device, config.optim, deterministic=config.run.deterministic)
    state = initial_state(config, device)
    size, rng = config.crops.clip_size, np.random.default_rng(0)
    shape = (config.optim.clips_per_slot, config.clip.num_frames, size, size, 3)
    clips = rng.integers(0, 256, shape, dtype=np.uint8)
    batch: Any = SimpleNamespace(step=0, slot=0, clips=clips, valid=np.ones(shape[0], bool))
    taken = []
    # A CUDA graph is recorded after its warm-up, and quick from the next call on.
    for _ in range(3 + WARM_UP_CALLS if has_graph(config, device) else 3):
        state.step = 0
        started = time.perf_counter()
        sums = sum_slots(state, [batch], torch.zeros(0, dtype=torch.int64), config, None)
        apply_step(state, sums, config)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken[1:]) * config.optim.slots
