"""The data bench, on a small short file: both loaders read the same clips."""

from __future__ import annotations

import pytest

from dora_ray.bench import data


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_reports_both_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WIDTH", 320)
    monkeypatch.setattr(data, "HEIGHT", 180)
    result = data.run(quick=True)
    assert result["ratio"] == pytest.approx(
        result["store_clips_per_core_second"] / result["reference_clips_per_core_second"]
    )
    assert result["ingest_frames_per_core_second"] > 0
