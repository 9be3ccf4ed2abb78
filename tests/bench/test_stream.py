"""Stream benchmark on a small film: every part is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_ray.bench import growth, stream
from dora_ray.bench.films import film
from dora_ray.video.index import index_video

SMALL = {"width": 160, "height": 96, "frames_per_second": 24, "seconds": 5, "group_size": 48}


@pytest.fixture(autouse=True)
def small_films(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("FILM", "SMALL_FILM", "LONG_FILM"):
        monkeypatch.setattr(stream, name, SMALL)
    monkeypatch.setattr(growth, "FILM", SMALL)
    monkeypatch.setattr(growth, "SAMPLE_SECONDS", 0.2)


def test_looped_film_is_as_long_as_its_loops() -> None:
    once, looped = index_video(film(**SMALL)), index_video(film(**SMALL, loops=3))
    assert len(looped.pts) == 3 * len(once.pts) == 360
    assert looped.real_seconds == pytest.approx(15)
    assert len(looped.key_pts) == 3 * len(once.key_pts)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_reports_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in {"SLOTS": 32, "SMALL_SLOTS": 64, "MEMORY_SLOTS": 640}.items():
        monkeypatch.setattr(stream, name, (few, few))
    monkeypatch.setattr(stream, "WARM_SLOTS", 4)
    monkeypatch.setattr(stream, "ROUNDS", 1)
    result = stream.run(quick=True)
    for case in ("paper_1", "paper_4", "paper_8", "small_1", "small_8"):
        stream_rate, bare = (result[f"{case}_ranks_{way}_clips_per_second"] for way in ("stream", "bare"))
        assert result[f"{case}_ranks_stream_overhead"] == pytest.approx(1 - stream_rate / bare)
    assert result["SplitCoordinator_most_mb"] > 0
    assert result["first_step_sooner"] > 0
