"""Summary of a sweep as Markdown (report.md)."""

from __future__ import annotations

from dora_ray import files
from dora_ray.reporting.analysis import Analysis, analyze, caution, costs, other_verdicts, verdict
from dora_ray.reporting.importance import importances
from dora_ray.reporting.interactions import describe_interaction, factor_pairs
from dora_ray.reporting.render import describe_machine, duration
from dora_ray.tuning.baseline import read_baseline
from dora_ray.tuning.results import read_csv, read_spec


def summarize(folder: str) -> str:
    """Return a sweep's summary as Markdown: verdict, points, effects, failures, environment."""
    spec = read_spec(folder)
    table = files.join(folder, "results.csv")
    rows = read_csv(table) if files.exists(table) else []
    baseline = read_baseline(folder)
    found = analyze(rows, spec, baseline)
    parts = [f"# {spec.question or 'A sweep'}", verdict(found)]
    if caution(spec):
        parts.append(caution(spec))
    if found.comparison.points:
        parts.append("\n".join(_points(found)))
    for key, levels in found.effects.items():
        told = "; ".join(f"{level.value}: {found.show_change(level.effect, sign=True)}" for level in levels)
        parts.append(f"Effect of `{key}` on {spec.metric}: {told}")
    parts += [words for pair in factor_pairs(found) if (words := describe_interaction(found, *pair))]
    if importance := _importance(found):
        parts.append(importance)
    parts += [f"By {metric}: {text}" for metric, text in other_verdicts(rows, spec, baseline)]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(f"- `{row.name}`: {row.error}" for row in failed))
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine().items())
    parts.append(f"{len(rows)} trials of `{spec.base}`, seeds {', '.join(map(str, spec.seeds))}. {machine}.")
    return "\n\n".join(parts) + "\n"


def _importance(found: Analysis) -> str:
    """Return the line of the factors' importances, the largest first."""
    shares, how = importances(found)
    told = ", ".join(
        f"`{key}` {100 * share:.0f} %" for key, share in sorted(shares.items(), key=lambda entry: -entry[1])
    )
    return f"Importance: {told}. {how}" if told else how


def _points(found: Analysis) -> list[str]:
    """Return the table of points, best first."""
    cost = costs(found)
    lines = [
        f"| point | {found.spec.metric} | 95 %, seeds | 95 %, test images | trials | cost per trial |",
        "|---|---|---|---|---|---|",
    ]
    sizes = {
        point: sum(row.metrics.get(found.spec.metric) is not None for row in rows)
        for point, rows in found.groups.items()
    }
    for point, estimate in found.comparison.points.items():
        outer = found.outer(estimate.value)
        cells = (
            found.label(point),
            found.show(estimate.value),
            f"± {found.show_half(estimate.half)}",
            f"± {found.show_half(outer)}" if outer else "",
            str(sizes[point]),
            duration(cost[point]) if point in cost else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines
