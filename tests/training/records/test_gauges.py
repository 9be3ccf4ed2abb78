"""A run's numbers as Ray's metrics, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from dora_ray.training.records.gauges import GAUGES, RunGauges, gauge_values

ROOT = Path(__file__).parents[3]
LINE = {
    "step": 10,
    "loss": 2.5,
    "clips_per_second": 80.0,
    "exposed_wait_seconds": 0.02,
    "step_seconds": 0.1,
    "bad_clips": 1.0,
    "world_size": 3,
}


def test_every_gauge_has_a_value_of_its_line():
    values = gauge_values(LINE)
    assert set(values) == set(GAUGES)
    assert values["dora_data_wait_share"] == pytest.approx(0.2)
    assert gauge_values({"step": 1}) == {"dora_step": 1.0}


def test_the_dashboard_shows_what_there_is():
    """Our gauges by their names, and Ray's by those that its own dashboards and agent have."""
    dashboard = json.loads((ROOT / "clusters" / "grafana-dashboard.json").read_text())
    shown = {name for panel in dashboard["panels"] for name in re.findall(r"\bray_\w+", panel["targets"][0]["expr"])}
    ours = {name for name in shown if name.startswith("ray_dora_")}
    assert ours == {f"ray_{name}" for name in GAUGES}
    sources = [*Path(ray.__file__).parent.glob("dashboard/modules/metrics/dashboards/*.py")]
    sources += Path(ray.__file__).parent.glob("dashboard/modules/reporter/reporter_agent.py")
    text = "\n".join(path.read_text() for path in sources)
    for name in shown - ours:
        assert name in text or f'"{name.removeprefix("ray_")}"' in text, name


@pytest.mark.ray
def test_prometheus_finds_them(ray_cluster):
    gauges = RunGauges("/runs/venice/")
    (node,) = ray_cluster.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    while set(found) != set(GAUGES) and time.monotonic() < deadline:
        gauges.set(LINE)
        time.sleep(1)
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        ours = [line for line in lines if line.startswith("ray_dora_") and 'run="venice"' in line]
        found = {line.partition("{")[0].removeprefix("ray_"): float(line.rpartition(" ")[2]) for line in ours}
    assert found == pytest.approx(gauge_values(LINE))
