"""The step's bench, on a network so small that it takes a second: what it reports is there and consistent."""

from __future__ import annotations

import pytest

from dora_ray.bench import step


def test_reports_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "GLOBAL_SIZE", 32)
    monkeypatch.setattr(
        step, "CPU_SETTING", {"width": 48, "num_heads": 3, "num_outputs": 32, "num_clips": 1, "local_size": 16}
    )
    result = step.run(quick=True)
    assert result["ratio"] == pytest.approx(result["seconds_per_step"] / result["reference_seconds_per_step"])
    assert result["rounds"] == 2
    assert result["tflop_per_step"] > 0
    assert 0 < result["matmul_share"] < 1
    assert result["peak_memory_mb"] > 0
