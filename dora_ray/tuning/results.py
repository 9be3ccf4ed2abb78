"""What runs and sweeps left in their folders, read back: metrics by step, a trial's final figures, results.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import yaml

from dora_ray import files
from dora_ray.training.records.journal import STATUS, read_metrics
from dora_ray.tuning.space import SEED_KEY, SweepSpec, Trial

Line = dict[str, Any]
BOOKKEEPING = frozenset({"step", "time", "attempt"})
FINAL_SHARE = 0.1


@dataclass(frozen=True)
class Row:
    """One trial in results.csv.

    Attributes:
        name: the trial's name.
        values: dotted key -> value of what was varied, run.seed included.
        status: done, stopped (by the scheduler), failed or missing.
        metrics: final figures, see `final_metrics`.
        path: the run's folder, relative to the sweep's.
        error: first line of what ended it; empty when nothing did.
    """

    name: str
    values: dict[str, Any]
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    path: str = ""
    error: str = ""

    @property
    def point(self) -> tuple[tuple[str, Any], ...]:
        """The values without the seed: trials that share them are repetitions."""
        return tuple((key, value) for key, value in self.values.items() if key != SEED_KEY)


def read_status(run: str) -> dict[str, Any]:
    """A run's status.json; empty when there is none."""
    path = files.join(run, STATUS)
    return dict(json.loads(files.read_text(path))) if files.exists(path) else {}


def final_metrics(lines: Sequence[Line]) -> dict[str, float]:
    """Final figures: the mean over the last tenth of the steps, or the last value of what is measured rarely."""
    if not lines:
        return {}
    newest = lines[-1]["step"]
    late = [line for line in lines if line["step"] > newest - max(1, round(FINAL_SHARE * newest))]
    names = {name: None for line in lines for name in line if name not in BOOKKEEPING}
    final = {name: _finite(late, name) or _finite(lines, name)[-1:] for name in names}
    return {name: fmean(values) for name, values in final.items() if values}


def _finite(lines: Iterable[Line], name: str) -> list[float]:
    values = (line.get(name) for line in lines)
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def trial_folder(sweep: str, name: str) -> str:
    """A trial's run folder."""
    return files.join(sweep, "trials", name)


def error_file(sweep: str, name: str) -> str:
    """Where the error that ended a trial is kept."""
    return files.join(sweep, "errors", f"{name}.txt")


def stopped_file(sweep: str, name: str) -> str:
    """The mark of a trial that the scheduler stopped early."""
    return files.join(sweep, "stopped", name)


def trial_status(sweep: str, name: str) -> str:
    """Row.status of a trial, from what its folders hold."""
    if read_status(trial_folder(sweep, name)).get("state") == "done":
        return "done"
    if files.exists(stopped_file(sweep, name)):
        return "stopped"
    return "failed" if files.exists(error_file(sweep, name)) else "missing"


def collect(sweep: str, trials: Sequence[Trial]) -> list[Row]:
    """One row a trial, in their order."""
    return [_collect_one(sweep, trial) for trial in trials]


def _collect_one(sweep: str, trial: Trial) -> Row:
    status = trial_status(sweep, trial.name)
    return Row(
        name=trial.name,
        values=trial.values,
        status=status,
        metrics=final_metrics(read_metrics(trial_folder(sweep, trial.name))),
        path=f"trials/{trial.name}",
        error=_first_line(error_file(sweep, trial.name)) if status == "failed" else "",
    )


def _first_line(path: str) -> str:
    text = files.read_text(path).strip()
    return text.splitlines()[0] if text else "no message"


def write_csv(path: str, rows: Sequence[Row]) -> None:
    """results.csv: name, the varied keys, status, the metrics, path, error."""
    keys, metrics = _union(row.values for row in rows), sorted(_union(row.metrics for row in rows))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["name", *keys, "status", *metrics, "path", "error"])
    for row in rows:
        values = (json.dumps(row.values[key]) if key in row.values else "" for key in keys)
        figures = (repr(row.metrics[name]) if name in row.metrics else "" for name in metrics)
        table.writerow([row.name, *values, row.status, *figures, row.path, row.error])
    files.write_text(path, buffer.getvalue())


def read_csv(path: str) -> list[Row]:
    """The rows of results.csv. A varied key has a dot in its name, a metric has none."""
    rows = []
    for cells in csv.DictReader(io.StringIO(files.read_text(path))):
        fixed = {name: cells.pop(name) for name in ("name", "status", "path", "error")}
        values = {key: json.loads(text) for key, text in cells.items() if "." in key and text}
        metrics = {key: float(text) for key, text in cells.items() if "." not in key and text}
        rows.append(Row(values=values, metrics=metrics, **fixed))
    return rows


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list({key: None for mapping in mappings for key in mapping})


def write_spec(path: str, spec: SweepSpec) -> None:
    """The sweep's file as it was understood, overrides included: `load_sweep` reads it back."""
    files.write_text(path, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def best_point(rows: Sequence[Row], metric: str, mode: str) -> list[Row]:
    """The trials of the point whose mean over seeds is best; empty when no trial has the metric."""
    groups = group_points(rows, metric)
    if not groups:
        return []
    means = {point: fmean(row.metrics[metric] for row in members) for point, members in groups.items()}
    return groups[(min if mode == "min" else max)(means, key=lambda point: means[point])]


def group_points(rows: Sequence[Row], metric: str) -> dict[tuple[tuple[str, Any], ...], list[Row]]:
    """Trials that finished and have the metric, by point."""
    groups: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        if row.status == "done" and metric in row.metrics:
            groups.setdefault(_hashable(row.point), []).append(row)
    return groups


def _hashable(point: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in point)
