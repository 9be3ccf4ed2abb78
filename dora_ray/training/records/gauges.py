"""Ray metrics of a run, collected by Prometheus and shown by clusters/grafana-dashboard.json.

Rank 0 sets them with each line of metrics.jsonl. Without a connection to Ray they do nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from dora_ray.training.records.waits import EXPOSED

# Gauge names, without Ray's prefix `ray_`, and their descriptions.
GAUGES = {
    "dora_step": "Optimizer steps done.",
    "dora_loss": "Loss, mean since the last line.",
    "dora_clips_per_second": "Training throughput of all workers, in clips per second.",
    "dora_data_wait_share": "Share of a step that the slowest worker waits for clips.",
    "dora_bad_clips": "Clips that could not be decoded, since step 0.",
    "dora_workers": "Training workers.",
}


def gauge_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the gauge values of a line of metrics; missing fields are left out."""
    fields = {"dora_step": "step", "dora_loss": "loss", "dora_clips_per_second": "clips_per_second"}
    fields |= {"dora_bad_clips": "bad_clips", "dora_workers": "world_size"}
    values = {gauge: float(line[field]) for gauge, field in fields.items() if field in line}
    if EXPOSED in line and line.get("step_seconds"):
        values["dora_data_wait_share"] = line[EXPOSED] / line["step_seconds"]
    return values


class RunGauges:
    """Gauges of one run; does nothing without Ray.

    Args:
        run: the run's folder or URI; its last part labels the run in the dashboard.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run.rstrip("/").rpartition("/")[2]}
        self._gauges: dict[str, Any] = {}
        ray: Any = importlib.import_module("ray")
        if ray.is_initialized():
            kind: Any = importlib.import_module("ray.util.metrics").Gauge
            self._gauges = {
                name: kind(name, description=meaning, tag_keys=("run",)) for name, meaning in GAUGES.items()
            }

    def set(self, line: Mapping[str, Any]) -> None:
        """Set the gauges from a line of metrics."""
        if self._gauges:
            for name, value in gauge_values(line).items():
                self._gauges[name].set(value, tags=self._tags)
