"""The data bench, on a small film: every path is measured, and the ratios are those of the rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_ray.bench import data


@pytest.mark.slow
def test_reports_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"WIDTH": 320, "HEIGHT": 180, "RATE": 24}.items():
        monkeypatch.setattr(data, name, value)
    result = data.run(quick=True)
    reference = result["reference_clips_per_core_second"]
    for path in ("store", "direct"):
        assert result[f"{path}_ratio"] == pytest.approx(result[f"{path}_clips_per_core_second"] / reference)
        assert result[f"{path}_decode_cores_a_gpu"] == pytest.approx(300 / result[f"{path}_clips_per_core_second"])
    assert result["ingest_frames_per_core_second"] > 0
    assert result["ffmpeg_frames_per_core_second"] > 0
    assert result["peak_rss_mb"] >= result["idle_rss_mb"] > 0
    assert len(list(tmp_path.rglob("*.mp4"))) == 1
