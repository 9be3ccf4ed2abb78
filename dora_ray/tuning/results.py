"""Results of sweeps, read from their folders: trial status, final metrics, results.csv and results.parquet."""

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
from dora_ray.config_source import parse_yaml
from dora_ray.training.records.journal import read_metrics, read_status
from dora_ray.tuning.axes import SEED_KEY
from dora_ray.tuning.space import SweepSpec, Trial, load_sweep

Line = dict[str, Any]
BOOKKEEPING = frozenset({"step", "time", "attempt"})
FINAL_SHARE = 0.1


@dataclass(frozen=True)
class Row:
    """One trial in results.csv.

    Attributes:
        name: the trial's name.
        values: varied key (dotted) -> value, run.seed included.
        status: done, stopped (by the scheduler), failed or missing.
        metrics: final metrics, see `final_metrics`.
        path: the run's folder, relative to the sweep's.
        error: first line of the error that ended it; empty without one.
    """

    name: str
    values: dict[str, Any]
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    path: str = ""
    error: str = ""

    @property
    def short_id(self) -> str:
        """Unique id at the end of the name."""
        return self.name.rsplit("_", 1)[-1]

    @property
    def point(self) -> tuple[tuple[str, Any], ...]:
        """Values without the seed; trials with the same point are repetitions."""
        return tuple((key, value) for key, value in self.values.items() if key != SEED_KEY)


def final_metrics(lines: Sequence[Line]) -> dict[str, float]:
    """Return the final metrics: means over the last tenth of the steps, or the last value of a rare measure."""
    if not lines:
        return {}
    newest = lines[-1]["step"]
    late = [line for line in lines if line["step"] > newest - max(1, round(FINAL_SHARE * newest))]
    names = {name: None for line in lines for name in line if name not in BOOKKEEPING}
    final = {name: _finite(late, name) or _finite(lines, name)[-1:] for name in names}
    figures = {name: fmean(values) for name, values in final.items() if values}
    return figures | _cost(lines) if "step_seconds" in names else figures


def _cost(lines: Sequence[Line]) -> dict[str, float]:
    """Return the seconds of all steps, and these times the number of workers; startup and evaluations excluded."""
    before = [0, *(line["step"] for line in lines)]
    steps = [(line["step"] - last, line) for last, line in zip(before, lines, strict=False)]
    seconds = [(count * line.get("step_seconds", 0.0), line.get("world_size", 1)) for count, line in steps]
    return {
        "train_seconds": sum(taken for taken, _ in seconds),
        "worker_seconds": sum(taken * workers for taken, workers in seconds),
    }


def _finite(lines: Iterable[Line], name: str) -> list[float]:
    values = (line.get(name) for line in lines)
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def trial_folder(sweep: str, name: str) -> str:
    """Return a trial's run folder."""
    return files.join(sweep, "trials", name)


def error_file(sweep: str, name: str) -> str:
    """Return the path of the error that ended a trial."""
    return files.join(sweep, "errors", f"{name}.txt")


def stopped_file(sweep: str, name: str) -> str:
    """Return the path of the marker of a trial that the scheduler stopped early."""
    return files.join(sweep, "stopped", name)


def trial_status(sweep: str, name: str) -> str:
    """Return a trial's `Row.status`, from the sweep's folder."""
    if read_status(trial_folder(sweep, name)).get("state") == "done":
        return "done"
    if files.exists(stopped_file(sweep, name)):
        return "stopped"
    return "failed" if files.exists(error_file(sweep, name)) else "missing"


def collect(sweep: str, trials: Sequence[Trial]) -> list[Row]:
    """Return one row per trial, in order."""
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
    """Write results.csv, with the columns name, varied keys, status, metrics, path, error."""
    keys, metrics = _union(row.values for row in rows), sorted(_union(row.metrics for row in rows))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["name", *keys, "status", *metrics, "path", "error"])
    for row in rows:
        values = (json.dumps(row.values[key]) if key in row.values else "" for key in keys)
        figures = (repr(row.metrics[name]) if name in row.metrics else "" for name in metrics)
        table.writerow([row.name, *values, row.status, *figures, row.path, row.error])
    files.write_text(path, buffer.getvalue())


def write_parquet(path: str, rows: Sequence[Row]) -> None:
    """Write results.parquet, with the columns of results.csv, numbers as numbers."""
    import pyarrow as pa
    import pyarrow.parquet

    records = [
        {
            "name": row.name,
            **{
                key: value if isinstance(value, int | float | str) else json.dumps(value)
                for key, value in row.values.items()
            },
            "status": row.status,
            **row.metrics,
            "path": row.path,
            "error": row.error,
        }
        for row in rows
    ]
    names = _union(records)
    columns = {name: _column([record.get(name) for record in records]) for name in names}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), buffer)
    files.write_bytes(path, buffer.getvalue())


def _column(values: list[Any]) -> list[Any]:
    """Convert a column to one type; to text if it mixes numbers and words."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values] if float in kinds else values
    return values if len(kinds) <= 1 else [None if value is None else str(value) for value in values]


def read_csv(path: str) -> list[Row]:
    """Read the rows of results.csv. Varied keys have a dot in their name, metrics have none."""
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
    """Write the parsed sweep file, overrides included, so that `load_sweep` can read it back."""
    files.write_text(path, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def read_spec(folder: str) -> SweepSpec:
    """Read the sweep file that is saved in a sweep's folder."""
    return load_sweep(parse_yaml(files.read_text(files.join(folder, "sweep.yaml")), "sweep.yaml"))


def best_point(rows: Sequence[Row], metric: str, mode: str) -> list[Row]:
    """Return the trials of the point with the best mean over seeds; empty if no trial has the metric."""
    groups = group_points(rows, metric)
    if not groups:
        return []
    means = {point: fmean(row.metrics[metric] for row in members) for point, members in groups.items()}
    return groups[(min if mode == "min" else max)(means, key=lambda point: means[point])]


def group_points(rows: Sequence[Row], metric: str) -> dict[tuple[tuple[str, Any], ...], list[Row]]:
    """Group the finished trials that have the metric by point."""
    groups: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for row in rows:
        if row.status == "done" and metric in row.metrics:
            groups.setdefault(hashable(row.point), []).append(row)
    return groups


def hashable(point: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """Return a point with tuples in place of lists, usable as a key."""
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in point)
