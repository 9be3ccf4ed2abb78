"""Report page of one run: health, evaluations of its encoder, curves, events, configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from statistics import fmean
from typing import Any

import yaml
from markupsafe import Markup

from dora_ray import files
from dora_ray.config import Config
from dora_ray.config_source import flatten
from dora_ray.errors import ConfigError
from dora_ray.evaluation.kept import read_evaluations
from dora_ray.reporting.charts import Bar, intervals
from dora_ray.reporting.curves import PANELS, Panel, draw_panel, series
from dora_ray.reporting.render import duration, figure, moment, read_pictures, render
from dora_ray.training.records.journal import read_events, read_metrics
from dora_ray.training.records.status import missing_frames, summarize
from dora_ray.training.records.waits import EXPOSED
from dora_ray.tuning.results import Line, final_metrics
from dora_ray.tuning.statistics import share_half

MAX_EVENTS = 200
EVENT_FIELDS = frozenset({"time", "event"})
Health = tuple[str, str, str]
# Thresholds for a warning: IoU of two objects' masks, share of the step time spent waiting for data.
MUCH_OVERLAP, MUCH_WAITING = 0.8, 0.15
NO_DIVERSITY = 0.02


def run_page(folder: str) -> str:
    """Return the report page of a run as HTML."""
    lines, status = read_metrics(folder), _status(folder)
    config = _read_config(folder)
    events = read_events(folder)
    panels = [(panel, draw_panel(panel, lines)) for panel in PANELS if _worth_drawing(panel, lines)]
    return render(
        "run.html.j2",
        name=PurePosixPath(folder).name,
        folder=folder,
        state=status.get("state", "unknown"),
        message=status.get("message", ""),
        health=_health(lines, events, config),
        tiles=_tiles(lines, status),
        measured=_measured(folder, lines),
        evaluations=_evaluations(folder),
        missing=missing_frames(events),
        warnings=[
            (moment(line.get("time")), line.get("step", ""), line.get("message", ""))
            for line in events
            if line.get("event") == "warning"
        ],
        panels=[(panel, Markup(html)) for panel, html in panels if html],
        pictures=read_pictures(files.join(folder, "pictures")),
        events=_events(events),
        changed=_changed(config),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
    )


def _status(folder: str) -> dict[str, Any]:
    try:
        return summarize(folder)
    except ConfigError:
        return {}


def _worth_drawing(panel: Panel, lines: Sequence[Line]) -> bool:
    """Return whether a panel needs a chart; a constant world size or a single measurement is shown as a tile."""
    if panel.title == "Workers":
        return len({line.get("world_size") for line in lines}) > 1
    return len(lines) < 2 or any(len(series(lines, name)[1]) > 1 for name, _ in panel.measures)


def _read_config(folder: str) -> dict[str, Any]:
    path = files.join(folder, "config.yaml")
    return dict(yaml.safe_load(files.read_text(path)) or {}) if files.exists(path) else {}


def _changed(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the settings that differ from the recipe `paper` as (key, the run's value, paper's value)."""
    default = flatten(Config().model_dump(mode="json"))
    return [(key, value, default.get(key)) for key, value in flatten(config).items() if value != default.get(key)]


def _health(lines: Sequence[Line], events: Sequence[Line], config: dict[str, Any]) -> list[Health]:
    """Check the run for collapse, overlapping objects and waiting for data; return a finding for each."""
    if not lines:
        return [("", "Nothing measured yet", "The first line of metrics is missing.")]
    final = final_metrics(lines)
    found = [_collapse(final, events, config), _overlap(final, config), _waiting(lines)]
    return [entry for entry in found if entry is not None]


def _collapse(final: dict[str, float], events: Sequence[Line], config: dict[str, Any]) -> Health | None:
    diversity = final.get("teacher_diversity")
    if diversity is None:
        return None
    outputs = flatten(config).get("head.num_outputs", 0) or math.inf
    if diversity < NO_DIVERSITY * (math.log(outputs) if math.isfinite(outputs) else 1.0):
        return (
            "bad",
            "Collapsed",
            f"The teacher gives nearly every image the same output (diversity {diversity:.2g} nats).",
        )
    warned = sum(line.get("event") == "warning" for line in events)
    more = f" {warned} warnings during training are listed below." if warned > 1 else ""
    more = " One warning during training is listed below." if warned == 1 else more
    return "good", "No collapse", f"The teacher's outputs differ between images (diversity {diversity:.2f} nats).{more}"


def _overlap(final: dict[str, float], config: dict[str, Any]) -> Health | None:
    overlap = final.get("object_overlap")
    if overlap is None or flatten(config).get("tracking.num_objects") == 1:
        return None
    said = f"Two objects of a clip share {100 * overlap:.0f} % of their patches (IoU)."
    if overlap > MUCH_OVERLAP:
        return "bad", "Objects overlap", f"{said} They add little: fewer objects may do as well."
    return "good", "Objects are distinct", said


def _waiting(lines: Sequence[Line]) -> Health | None:
    waits, steps = series(lines, EXPOSED)[1], series(lines, "step_seconds")[1]
    if not waits or not steps:
        return None
    share = sum(waits) / max(sum(steps), 1e-9)
    said = f"Steps spent {100 * share:.1f} % of their time waiting for clips."
    if share > MUCH_WAITING:
        return "bad", "Waits for data", f"{said} More decode CPUs or a store would speed it up."
    return "good", "Data keeps up", said


def _tiles(lines: Sequence[Line], status: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the tiles at the top as (label, value, remark)."""
    if not lines:
        return [("steps", "0", "nothing measured yet")]
    final = final_metrics(lines)
    steps = status.get("steps")
    tiles = [("steps", str(lines[-1]["step"]), f"of {steps}" if steps else "")]
    for name, label in (
        ("loss", "loss"),
        ("object_agreement", "agreement, objects"),
        ("local_agreement", "agreement, locals"),
    ):
        _, values = series(lines, name)
        if values:
            tiles.append((label, f"{final[name]:.3f}", f"from {fmean(values[: max(1, len(values) // 50)]):.3f}"))
    for name, label in (
        ("knn", "kNN, top 1"),
        ("j_and_f", "J&F"),
        ("object_iou", "object IoU"),
        ("view_matching", "view matching"),
    ):
        if name in final:
            tiles.append((label, f"{100 * final[name]:.1f} %", "at the last evaluation"))
    if "clips_per_second" in final:
        tiles.append(("throughput", f"{final['clips_per_second']:.1f}", "clips/s"))
    if "train_seconds" in final:
        tiles.append(("trained for", duration(final["train_seconds"]), "steps only"))
    sizes = sorted({line["world_size"] for line in lines if "world_size" in line})
    if sizes:
        span = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        tiles.append(("workers", span, f"{status.get('failures', 0)} failures"))
    return tiles


def _measured(folder: str, lines: Sequence[Line]) -> list[tuple[str, Markup]]:
    """Draw this run's accuracies beside those of random encoders of its architecture, if both were evaluated."""
    found = [line for line in read_evaluations(folder) if line["task"] in ("knn", "linear")]
    drawn = []
    for task in dict.fromkeys(line["task"] for line in found):
        mine = [line for line in found if line["task"] == task]
        trained = [line for line in mine if not line.get("settings", {}).get("random_init")]
        drawn_from = trained[-1:] + [line for line in mine if line.get("settings", {}).get("random_init")][-5:]
        bars = [_bar(line) for line in drawn_from if "top1" in line.get("results", {})]
        if trained and bars:
            chance = trained[-1]["results"].get("chance")
            references = [("chance", 100 * chance)] if chance is not None else []
            said = f"{task}: {bars[0].value:.1f} % for this run, " + ", ".join(f"{bar.value:.1f} %" for bar in bars[1:])
            html = intervals(bars, title=f"{task}, top 1, %", label=said, references=references)
            drawn.append((f"{task}: this run and random encoders", Markup(html)))
    return drawn


def _bar(line: dict[str, Any]) -> Bar:
    results, settings = line["results"], line.get("settings", {})
    random = bool(settings.get("random_init"))
    half = share_half(results["top1"], results["num_test"]) if results.get("num_test") else 0.0
    label = f"random, seed {settings.get('seed', 0)}" if random else "this run"
    return Bar(label, 100 * results["top1"], math.inf, 100 * half, "c7" if random else "c0")


def _evaluations(folder: str) -> list[dict[str, str]]:
    """List the run's evaluations: time, task, main results, data."""
    rows = []
    for line in read_evaluations(folder):
        numbers = {
            name: value
            for name, value in line.get("results", {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        rows.append(
            {
                "when": moment(line.get("time")),
                "task": line["task"] + (" (random encoder)" if line.get("settings", {}).get("random_init") else ""),
                "figures": ", ".join(f"{name} {figure(value)}" for name, value in list(numbers.items())[:6]),
                "data": str(line.get("data", "")),
            }
        )
    return rows


def _events(events: Sequence[Line]) -> list[tuple[str, str, str]]:
    """List the events except warnings, newest last, as (time, event, details)."""
    rows = []
    for line in [line for line in events if line.get("event") != "warning"][-MAX_EVENTS:]:
        detail = ", ".join(f"{key} {figure(value)}" for key, value in line.items() if key not in EVENT_FIELDS)
        rows.append((moment(line.get("time")), str(line.get("event", "")), detail))
    return rows
