"""report.html of a run or of a sweep: one file that holds everything it shows, so that it opens anywhere, offline."""

from __future__ import annotations

import base64
import datetime
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

import jinja2
import plotly.offline
import yaml
from markupsafe import Markup

from dora_ray import files
from dora_ray.config import Config
from dora_ray.config_source import flatten
from dora_ray.errors import ConfigError
from dora_ray.reporting.figures import PANELS, draw_key, draw_panel, series
from dora_ray.training.records.journal import read_events, read_metrics
from dora_ray.training.records.status import missing_frames
from dora_ray.tuning.results import (
    Line,
    Row,
    best_point,
    final_metrics,
    group_points,
    read_csv,
    read_status,
)
from dora_ray.tuning.space import SEED_KEY, SweepSpec, load_sweep

PICTURE_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}
MAX_PICTURES = 12
MAX_PICTURE_BYTES = 8_000_000
MAX_EVENTS = 200
SHOWN_MEASURES = (
    "loss",
    "knn",
    "object_iou",
    "tracking_iou",
    "view_matching",
    "rankme",
    "object_agreement",
    "local_agreement",
    "teacher_entropy",
    "teacher_diversity",
    "mask_area",
    "object_overlap",
    "clips_per_second",
)
EVENT_FIELDS = frozenset({"time", "event"})


def report(path: str | os.PathLike[str]) -> Path:
    """Write report.html into a run's or a sweep's folder.

    Args:
        path: the folder, local or a URI.

    Returns:
        The file's path.

    Raises:
        ConfigError: the folder is neither a run nor a sweep.
    """
    folder = files.absolute(path)
    if files.exists(files.join(folder, "sweep.yaml")):
        html = _sweep_page(folder)
    elif files.exists(files.join(folder, "config.yaml")) or files.exists(files.join(folder, "metrics.jsonl")):
        html = _run_page(folder)
    else:
        found = ", ".join(files.list_names(folder)[:6]) or "nothing"
        raise ConfigError(
            f"{folder} is neither a run nor a sweep: it holds {found}. "
            "Give the folder that `dora-ray train` or `dora-ray sweep` wrote."
        )
    target = files.join(folder, "report.html")
    files.write_text(target, html)
    return Path(target)


def _render(template: str, **values: Any) -> str:
    loader = jinja2.PackageLoader("dora_ray.reporting")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure_text
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(
        plotly_js=Markup(plotly.offline.get_plotlyjs()), written=now, **values
    )


def _figure_text(value: Any) -> str:
    """A number for reading: four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _run_page(folder: str) -> str:
    lines, status = read_metrics(folder), read_status(folder)
    config = _read_config(folder)
    panels = [(panel, draw_panel(panel, lines)) for panel in PANELS if _worth_drawing(panel.title, lines)]
    return _render(
        "run.html.j2",
        name=PurePosixPath(folder).name,
        folder=folder,
        state=status.get("state", "unknown"),
        tiles=_tiles(lines, status),
        missing=missing_frames(read_events(folder)),
        panels=[(panel, Markup(html)) for panel, html in panels if html],
        pictures=_pictures(files.join(folder, "pictures")),
        events=_events(folder),
        changed=_changed(config),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
    )


def _worth_drawing(title: str, lines: Sequence[Line]) -> bool:
    """A world size that never changed is a tile, not a chart."""
    return title != "Workers" or len({line.get("world_size") for line in lines}) > 1


def _read_config(folder: str) -> dict[str, Any]:
    path = files.join(folder, "config.yaml")
    return dict(yaml.safe_load(files.read_text(path)) or {}) if files.exists(path) else {}


def _changed(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What the run's configuration has otherwise than the recipe `paper`: key, the run's value, paper's."""
    default = flatten(Config().model_dump(mode="json"))
    return [(key, value, default.get(key)) for key, value in flatten(config).items() if value != default.get(key)]


def _tiles(lines: Sequence[Line], status: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the top: label, figure, a remark."""
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
    if "knn" in final:
        tiles.append(("kNN", f"{100 * final['knn']:.1f} %", "top 1"))
    if "clips_per_second" in final:
        tiles.append(("throughput", f"{final['clips_per_second']:.1f}", "clips/s"))
    waits, steps_taken = series(lines, "data_wait_seconds")[1], series(lines, "step_seconds")[1]
    if waits and steps_taken:
        tiles.append(("data wait", f"{100 * sum(waits) / max(sum(steps_taken), 1e-9):.1f} %", "of the steps' time"))
    sizes = sorted({line["world_size"] for line in lines if "world_size" in line})
    if sizes:
        span = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        tiles.append(("workers", span, f"{status.get('failures', 0)} failures"))
    return tiles


def _pictures(folder: str) -> list[tuple[str, str, str]]:
    """Pictures and short videos of a folder as (caption, MIME type, data URI)."""
    found = []
    for name in files.list_names(folder):
        kind = PICTURE_TYPES.get(PurePosixPath(name).suffix.lower())
        if kind is None or len(found) == MAX_PICTURES:
            continue
        content = files.read_bytes(files.join(folder, name))
        if len(content) <= MAX_PICTURE_BYTES:
            caption = PurePosixPath(name).stem.replace("_", " ").replace("-", " ")
            found.append((caption, kind, f"data:{kind};base64,{base64.b64encode(content).decode()}"))
    return found


def _events(folder: str) -> list[tuple[str, str, str]]:
    """What happened, newest last: time of day, event, everything else that was noted."""
    rows = []
    for line in read_events(folder)[-MAX_EVENTS:]:
        moment = line.get("time")
        clock = (
            f"{datetime.datetime.fromtimestamp(moment, datetime.UTC):%H:%M:%S}"
            if isinstance(moment, int | float)
            else str(moment or "")
        )
        detail = ", ".join(f"{key} {_figure_text(value)}" for key, value in line.items() if key not in EVENT_FIELDS)
        rows.append((clock, str(line.get("event", "")), detail))
    return rows


def _sweep_page(folder: str) -> str:
    spec = load_sweep(yaml.safe_load(files.read_text(files.join(folder, "sweep.yaml"))))
    table = files.join(folder, "results.csv")
    rows = read_csv(table) if files.exists(table) else []
    best = best_point(rows, spec.metric, spec.mode)
    keys = [key for key in spec.space if len({str(row.values.get(key)) for row in rows}) > 1]
    drawn = keys if best else []
    return _render(
        "sweep.html.j2",
        name=PurePosixPath(folder).name,
        folder=folder,
        spec=spec,
        seed_key=SEED_KEY,
        answer=answer(rows, spec),
        warning=caution(spec),
        figures=[(key, Markup(draw_key(key, rows, spec.metric, best))) for key in drawn],
        points=_points_table(rows, spec),
        measures=[name for name in SHOWN_MEASURES if any(name in row.metrics for row in rows)],
        rows=rows,
        best={row.name for row in best},
        failed=[row for row in rows if row.status == "failed"],
    )


def _points_table(rows: Sequence[Row], spec: SweepSpec) -> list[dict[str, Any]]:
    """One line a point, best first: its values, trials, and the metric's mean and range over the seeds."""
    table = []
    for members in group_points(rows, spec.metric).values():
        values = [row.metrics[spec.metric] for row in members]
        table.append(
            {
                "values": dict(members[0].point),
                "trials": len(values),
                "mean": fmean(values),
                "low": min(values),
                "high": max(values),
            }
        )
    return sorted(table, key=lambda entry: entry["mean"], reverse=spec.mode == "max")


def answer(rows: Sequence[Row], spec: SweepSpec) -> str:
    """What the sweep found, in a sentence or two that claim no more than the seeds carry."""
    points = _points_table(rows, spec)
    if not points:
        return f"No trial has finished with a {spec.metric} yet."
    best, others = points[0], points[1:]
    first = f"{_say(best['values'])} gave the best {spec.metric}: {best['mean']:.4g}"
    if not others:
        return f"{first}. It is the only point that finished."
    if best["trials"] == 1:
        return (
            f"{first}, with one seed a point: this sweep cannot tell how much of it is chance. List two or more seeds."
        )
    first += f" on average over {best['trials']} seeds ({best['low']:.4g} to {best['high']:.4g})."
    tied = [point for point in others if point["low"] <= best["high"] and point["high"] >= best["low"]]
    if not tied:
        next_best = f"{_say(others[0]['values'])} with {others[0]['mean']:.4g}"
        return f"{first} No seed of another point reached its range; the next was {next_best}."
    names = "; ".join(f"{_say(point['values'])} with {point['mean']:.4g}" for point in tied[:3])
    more = f", and {len(tied) - 3} more" if len(tied) > 3 else ""
    share = f"{len(tied)} of the {len(others)} other points ({names}{more})"
    return f"{first} Its seeds overlap with those of {share}: this sweep cannot tell them apart."


def caution(spec: SweepSpec) -> str:
    """Why the metric may not mean what the reader hopes; empty for an accuracy."""
    if spec.metric == "knn":
        return ""
    return (
        f"{spec.metric} is measured against each trial's own teacher, on its own views: "
        "a better value is not a better encoder. To compare encoders, give a labeled folder: evaluation.images=DIR, "
        "metric=knn, mode=max."
    )


def _say(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_figure_text(value)}" for key, value in values.items())
