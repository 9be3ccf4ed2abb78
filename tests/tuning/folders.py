"""Folders as runs and sweeps leave them, with made-up figures: input for the tests of reports."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dora_ray.config import load_config
from dora_ray.tuning.results import Row, write_csv, write_spec
from dora_ray.tuning.space import Trial, expand, load_sweep


def write_run(folder: Path, *, steps: int = 300, knn_every: int = 100) -> Path:
    """A finished run that was resized from 2 workers to 1 in its middle."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    lines = []
    for step in range(1, steps + 1):
        share = step / steps
        line: dict[str, float] = {
            "step": step,
            "time": 1.7e9 + step,
            "attempt": int(share > 0.5),
            "world_size": 1 if share > 0.5 else 2,
            "loss": 5.5 - 2 * share + 0.2 * rng.random(),
            "object_agreement": 0.3 + 0.5 * share + 0.05 * rng.random(),
            "local_agreement": 0.25 + 0.4 * share + 0.05 * rng.random(),
            "teacher_entropy": 4 - share + 0.1 * rng.random(),
            "teacher_kl_uniform": 1 + share,
            "mask_area": 0.45 + 0.02 * rng.random(),
            "object_overlap": 0.3 - 0.1 * share,
            "sinkhorn_residual": 0.01 * rng.random(),
            "center_norm": 0.2 + 0.1 * share,
            "lr": 1e-3 * (0.5 + 0.5 * math.cos(math.pi * share)),
            "weight_decay": 0.04 + 0.36 * share,
            "teacher_momentum": 0.996 + 0.004 * share,
            "clips_per_second": 20 + rng.random(),
            "exposed_wait_seconds": 0.02 * rng.random(),
            "step_seconds": 0.8 + 0.1 * rng.random(),
        }
        if step % knn_every == 0:
            line["knn"] = 0.2 + 0.1 * share
            line |= {"object_iou": 0.2 + 0.05 * share, "view_matching": 0.3 + 0.2 * share, "rankme": 20 + 9 * share}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    events = [
        {"time": 1.7e9, "event": "start", "world_size": 2},
        {"time": 1.7e9 + 150, "event": "resize", "from": 2, "to": 1, "steps_lost": 0},
        {"time": 1.7e9 + steps, "event": "end", "step": steps},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "status.json").write_text(
        json.dumps({"state": "done", "step": steps, "steps": steps, "world_size": 1, "failures": 1})
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(load_config("tiny").model_dump(mode="json")))
    return folder


def write_sweep(folder: Path, values: list[list[float | None]], *, metric: str = "knn", mode: str = "max") -> Path:
    """A sweep over num_objects whose trials measured `values[point][seed]`; None is a trial that failed."""
    folder.mkdir(parents=True)
    spec = load_sweep(
        {
            "question": "How many objects should a clip have?",
            "space": {"tracking.num_objects": {"grid": list(range(1, len(values) + 1))}},
            "seeds": list(range(len(values[0]))),
            "metric": metric,
            "mode": mode,
        }
    )
    write_spec(str(folder / "sweep.yaml"), spec)
    figures = [value for seeds in values for value in seeds]
    rows = [_row(trial, metric, figure) for trial, figure in zip(expand(spec), figures, strict=True)]
    write_csv(str(folder / "results.csv"), rows)
    return folder


def write_crossed(
    folder: Path, space: Mapping[str, Sequence[Any]], figures: Mapping[str, Callable[[Trial], float]], *, seeds: int = 3
) -> list[Row]:
    """A finished sweep over all combinations of several factors; its metric is the first of the figures."""
    folder.mkdir(parents=True)
    spec = load_sweep(
        {
            "space": {key: {"grid": list(values)} for key, values in space.items()},
            "seeds": list(range(seeds)),
            "metric": next(iter(figures)),
            "mode": "max",
        }
    )
    write_spec(str(folder / "sweep.yaml"), spec)
    rows = [
        Row(trial.name, trial.values, "done", {name: of(trial) for name, of in figures.items()}, f"trials/{trial.name}")
        for trial in expand(spec)
    ]
    write_csv(str(folder / "results.csv"), rows)
    return rows


def _row(trial, metric: str, figure: float | None) -> Row:
    path = f"trials/{trial.name}"
    if figure is None:
        return Row(trial.name, trial.values, "failed", {}, path, "RuntimeError: <the disk> is full")
    return Row(trial.name, trial.values, "done", {metric: figure, "clips_per_second": 20.5}, path)
