"""Report page of a sweep: the verdict first, then the evidence."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from markupsafe import Markup

from dora_ray import files
from dora_ray.reporting import charts
from dora_ray.reporting.analysis import (
    Analysis,
    analyze,
    caution,
    costs,
    is_share,
    other_verdicts,
    verdict,
)
from dora_ray.reporting.charts import Bar, Costed, front_of
from dora_ray.reporting.curves import legend, overlay, series
from dora_ray.reporting.importance import importances
from dora_ray.reporting.interactions import describe_interaction, factor_pairs
from dora_ray.reporting.points import MAX_POINTS, describe_references, draw_points, percent
from dora_ray.reporting.render import THUMBNAIL_WIDTH, Picture, duration, figure, render, shrink
from dora_ray.reporting.svg import COLORS
from dora_ray.training.records.journal import read_metrics
from dora_ray.tuning.axes import SEED_KEY, keys_of_axis, value_at
from dora_ray.tuning.baseline import read_baseline
from dora_ray.tuning.interactions import interaction
from dora_ray.tuning.progress import summarize_sweep
from dora_ray.tuning.results import Row, read_csv, read_spec
from dora_ray.tuning.space import SweepSpec
from dora_ray.tuning.statistics import pareto

# Of many points the page shows the best; the table has all of them.
MAX_PICTURES = 24
SHOWN_MEASURES = (
    "loss",
    "knn",
    "j_and_f",
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
    "worker_seconds",
)
CURVES = ("knn", "j_and_f", "object_iou", "view_matching", "loss", "object_agreement")


def sweep_page(folder: str) -> str:
    """Return the report page of a sweep as HTML."""
    spec = read_spec(folder)
    table = files.join(folder, "results.csv")
    rows = read_csv(table) if files.exists(table) else []
    baseline = read_baseline(folder)
    found = analyze(rows, spec, baseline)
    points = found.comparison.points
    importance, note = importances(found)
    many = len(found.done) > 1
    return render(
        "sweep.html.j2",
        name=PurePosixPath(folder).name,
        folder=folder,
        spec=spec,
        state=summarize_sweep(folder)["state"],
        answer=verdict(found),
        warning=caution(spec),
        others=other_verdicts(rows, spec, baseline),
        tiles=_tiles(rows, spec),
        command=_command(folder, found),
        points=_mark(draw_points(found, title=_unit(found))) if points else "",
        shown_points=min(len(points), MAX_POINTS),
        hidden_points=max(0, len(points) - MAX_POINTS),
        images=found.images,
        references=describe_references(found),
        effects=[(key, _mark(_draw_effect(found, key))) for key in found.effects],
        importance=sorted(importance.items(), key=lambda entry: -entry[1]),
        importance_note=note,
        maps=_maps(found),
        **_curves(folder, found),
        **_draw_cost(found),
        rays=_mark(_draw_rays(found)) if many and len(found.factors) > 1 else "",
        pictures=_pictures(folder, found),
        failed=[
            {"id": row.short_id, "values": _values(row), "error": row.error} for row in rows if row.status == "failed"
        ],
        **_table(folder, found),
    )


def _mark(html: str) -> Markup:
    return Markup(html)


def _tiles(rows: Sequence[Row], spec: SweepSpec) -> list[tuple[str, str, str]]:
    """Return the tiles at the top as (label, value, remark)."""
    counts = {name: sum(row.status == name for row in rows) for name in ("done", "stopped", "failed", "missing")}
    tiles = [("trials done", f"{counts['done']} of {max(spec.count, len(rows))}", f"{len(spec.seeds)} seeds a point")]
    if counts["stopped"]:
        tiles.append(("stopped early", str(counts["stopped"]), "by the scheduler"))
    tiles.append(("failed", str(counts["failed"]), "reasons below" if counts["failed"] else "none"))
    spent = [row.metrics["worker_seconds"] for row in rows if "worker_seconds" in row.metrics]
    if spent:
        tiles.append(("cost of all", duration(sum(spent)), "worker time of the steps"))
        tiles.append(("a trial", duration(sum(spent) / len(spent)), "worker time, mean"))
    return tiles


def _command(folder: str, found: Analysis) -> str:
    """Return the command that trains the best point again with the first seed."""
    best = _best_rows(found)
    if not best:
        return ""
    return shlex.join(["dora-ray", "train", files.join(folder, best[0].path, "config.yaml"), "--out", "runs/best"])


def _best_rows(found: Analysis) -> list[Row]:
    if not found.comparison.points:
        return []
    return found.groups[next(iter(found.comparison.points))]


def _unit(found: Analysis) -> str:
    return f"{found.spec.metric}, %" if is_share(found.spec.metric) else found.spec.metric


def _draw_effect(found: Analysis, key: str) -> str:
    scale = percent(found)
    bars = [
        Bar(figure(level.value), scale * level.effect.value, scale * level.effect.half) for level in found.effects[key]
    ]
    told = "; ".join(f"{bar.label} {bar.value:+.3g}" for bar in bars)
    said = f"Effect of {key} on {found.spec.metric}: {told}."
    return charts.intervals(bars, title=f"change of {_unit(found)}", label=said, zero=True)


def _maps(found: Analysis) -> list[tuple[str, str, Markup]]:
    """Heat maps of pairs of factors: title, what they show in words, drawing."""
    drawn = []
    for first, second in factor_pairs(found):
        cells = interaction(found.observations, found.value_of(first), found.value_of(second))
        scaled = {pair: percent(found) * mean for pair, mean in cells.items()}
        names = " and ".join(key.rsplit(".", 1)[-1] for key in (first, second))
        html = charts.heat_map(scaled, rows=first, columns=second, metric=found.spec.metric)
        drawn.append((names, describe_interaction(found, first, second), _mark(html)))
    return drawn


def _curves(folder: str, found: Analysis) -> dict[str, Any]:
    """Draw overlaid curves of the trials, with a legend for each factor that can color them."""
    rows = [row for row in found.rows if row.status in ("done", "stopped", "missing")]
    lines = {row.name: read_metrics(files.join(folder, row.path)) for row in rows}
    keys = list(found.factors) or list(found.spec.space)[:1]
    groups, legends = {}, []
    for key in keys:
        places, words = _groups(rows, key)
        groups[key] = places
        legends.append(Markup(legend(words)))
    drawn = []
    for metric in dict.fromkeys((found.spec.metric, *CURVES)):
        measured = {name: series(of_trial, metric) for name, of_trial in lines.items()}
        curves = {name: curve for name, curve in measured.items() if curve[1]}
        # Skip measures taken only at the last step: a column of dots is no curve, and their values are shown above.
        if any(len(values) > 1 for _, values in curves.values()):
            drawn.append((metric, Markup(overlay(curves, groups, metric))))
    return {"curves": drawn, "factors": keys, "legends": legends}


def _groups(rows: Sequence[Row], key: str) -> tuple[dict[str, int], list[str]]:
    """From trial to the number of its value, and the values' words; many numbers become as many ranges as colors."""
    values = charts.ordered([value_at(row.values, key) for row in rows])
    if len(values) <= COLORS:
        order = {str(value): index for index, value in enumerate(values)}
        words = [figure(value) for value in values]
    else:
        size = -(-len(values) // COLORS)
        order = {str(value): index // size for index, value in enumerate(values)}
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        words = [f"{figure(part[0])} to {figure(part[-1])}" for part in parts]
    return {row.name: order[str(value_at(row.values, key))] for row in rows}, words


def _costed(found: Analysis) -> list[Costed]:
    """The points whose cost is known, best first."""
    cost, scale = costs(found), percent(found)
    known = {point: estimate for point, estimate in found.comparison.points.items() if point in cost}
    both = {point: (cost[point], estimate.value) for point, estimate in known.items()}
    front = set(pareto(both, mode=found.spec.mode))
    return [
        Costed(found.label(point), cost[point], scale * estimate.value, scale * estimate.half, point in front)
        for point, estimate in known.items()
    ]


def _draw_cost(found: Analysis) -> dict[str, Any]:
    """Cost against quality, and the names of the points that none beats in both."""
    points = _costed(found)
    if len(points) < 2:
        return {"cost": "", "front": []}
    html = charts.cost_and_quality(points, metric=_unit(found), cost="worker seconds a trial")
    return {"cost": _mark(html), "front": [point.label for point in front_of(points)]}


def _draw_rays(found: Analysis) -> str:
    rows = [
        {key: value_at(row.values, key) for key in found.factors}
        | {found.spec.metric: percent(found) * row.metrics[found.spec.metric]}
        for row in found.done
    ]
    return charts.parallel(rows, found.factors, metric=found.spec.metric, mode=found.spec.mode)


def _pictures(folder: str, found: Analysis) -> list[Picture]:
    """Return each point's picture of the first clip, from its first finished trial, best points first."""
    pictures = []
    for point in list(found.comparison.points)[:MAX_PICTURES]:
        row = found.groups[point][0]
        path = files.join(folder, row.path, "pictures", "clip-0.png")
        if files.exists(path):
            value = found.show(row.metrics[found.spec.metric])
            words = f"{found.label(point)}, seed {row.values[SEED_KEY]}: {found.spec.metric} {value}"
            alt = f"Objects that the teacher of trial {row.short_id} discovers and tracks in the sweep's clip; {words}"
            uri = shrink(files.read_bytes(path), THUMBNAIL_WIDTH)
            pictures.append(Picture(uri, alt, f"{row.short_id}: {words}", link=f"{row.path}/report.html"))
    return pictures


def _values(row: Row) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {figure(value)}" for key, value in row.values.items())


@dataclass(frozen=True)
class _TableRow:
    id: str
    page: str
    best: bool
    cells: list[tuple[str, str]]


def _table(folder: str, found: Analysis) -> dict[str, Any]:
    """Return the columns and rows of the sortable table."""
    measures = [name for name in (found.spec.metric, *SHOWN_MEASURES) if any(name in row.metrics for row in found.rows)]
    measures = list(dict.fromkeys(measures))
    keys = [*(key for axis in found.spec.space for key in keys_of_axis(axis)), SEED_KEY]
    best = {row.name for row in _best_rows(found)}
    rows = []
    for row in found.rows:
        values = [(str(row.values.get(key, "")), figure(row.values.get(key))) for key in keys]
        figures = [
            (repr(row.metrics[name]), figure(row.metrics[name])) if name in row.metrics else ("", "")
            for name in measures
        ]
        # A sweep's pages are written for those that have ended, a folder that is not here has none.
        page = f"{row.path}/report.html" if row.status in ("done", "stopped", "failed") else ""
        rows.append(_TableRow(row.short_id, page, row.name in best, [*values, (row.status, row.status), *figures]))
    names = [key.rsplit(".", 1)[-1] for key in keys]
    return {"columns": ["id", *names, "status", *(name.replace("_", " ") for name in measures)], "rows": rows}
