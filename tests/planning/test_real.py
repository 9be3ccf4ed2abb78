"""Plans compared with reality: a filled store, and trainings on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import dora_ray
from dora_ray.planning.figures import load_figures
from dora_ray.planning.model import Cluster, estimate, store_bytes
from dora_ray.planning.workload import film_of, workload_of
from dora_ray.training import loop
from dora_ray.training.launch import check_videos


def test_the_stores_size(store: Path, small: tuple[str, ...], tmp_path: Path):
    config = dora_ray.load_config("tiny", *small, f"data.store={tmp_path / 'store'}", "data.short_side=272")
    work = workload_of(config, [film_of(index) for index in check_videos(config)])
    dora_ray.train(config, out=tmp_path / "run")
    frames = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.lance") if path.is_file())
    assert frames > 0
    assert store_bytes(work, load_figures().rates) == pytest.approx(frames, rel=0.8), "pictures differ: within 2 times"


@pytest.mark.slow
def test_hours_of_a_run_from_the_rate_of_another(
    small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One training measures the core's rate; it predicts the time of a training with four times the work per step.

    Steps are measured in CPU time, which does not depend on the machine's other work.
    """
    monkeypatch.setattr(loop, "time", SimpleNamespace(**{**vars(time), "monotonic": time.thread_time}))
    few = dora_ray.load_config("tiny", *small, "optim.slots=2", "optim.clips_per_slot=4", "optim.steps=12")
    many = dora_ray.load_config(few, "optim.slots=4", "optim.clips_per_slot=8")
    films = [film_of(index) for index in check_videos(few)]
    rates = load_figures().rates
    before, after = (_seconds_per_step(config, tmp_path / f"{config.optim.slots}") for config in (few, many))
    work = workload_of(few, films)
    rate = work.clips_per_step * work.tflop_per_clip / before
    measured = type(rates)(**{**vars(rates), "core_tflop": rate, "read_pixel_seconds": 0.0, "slot_seconds": 0.0})
    foretold = estimate(workload_of(many, films), measured, Cluster(1, False, cores=1)).step_seconds
    assert foretold == pytest.approx(4 * before)
    assert after == pytest.approx(foretold, rel=0.6), "two threads share what a core has"


def _seconds_per_step(config: dora_ray.Config, run: Path) -> float:
    dora_ray.train(config, out=run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted(line["step_seconds"] for line in lines[3:])[len(lines[3:]) // 2]
