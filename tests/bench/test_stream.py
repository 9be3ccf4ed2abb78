"""The stream bench on a small film: every part is measured; and shuffling is told apart by its measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_ray.bench import stream
from dora_ray.bench.films import film
from dora_ray.bench.shuffling import shuffling
from dora_ray.config import load_config
from dora_ray.video.index import index_video

SMALL = {"width": 160, "height": 96, "frames_per_second": 24, "seconds": 5, "group_size": 48}


@pytest.fixture(autouse=True)
def small_films(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stream, "FILM", SMALL)
    monkeypatch.setattr(stream, "SMALL_FILM", SMALL)


def test_looped_film_is_as_long_as_its_loops() -> None:
    once, looped = index_video(film(**SMALL)), index_video(film(**SMALL, loops=3))
    assert len(looped.pts) == 3 * len(once.pts) == 360
    assert looped.real_seconds == pytest.approx(15)
    assert len(looped.key_pts) == 3 * len(once.key_pts)


def test_more_segments_in_a_pool_are_shuffled_better() -> None:
    index = index_video(film(**SMALL))
    found = {
        pool: shuffling(load_config("paper", "clip.avoid_cuts=false", f"data.shuffle_segments={pool}"), index)
        for pool in (1, 8)
    }
    assert found[1]["store_pairs_within_a_minute"] == found[8]["store_pairs_within_a_minute"] < 0.03
    assert found[1]["direct_pairs_within_a_minute"] > found[8]["direct_pairs_within_a_minute"]
    assert found[1]["direct_neighbor_correlation"] > found[8]["direct_neighbor_correlation"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_reports_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in {"STEPS": 12, "WAIT_STEPS": 8, "RANK_SLOTS": 32}.items():
        monkeypatch.setattr(stream, name, (few, few))
    monkeypatch.setattr(stream, "WARM_STEPS", 4)
    monkeypatch.setattr(stream, "WARM_SECONDS", 2.0)
    monkeypatch.setattr(stream, "ROUNDS", 1)
    monkeypatch.setattr(stream, "FEWEST_SLOTS", 8)
    result = stream.run(quick=True)
    assert result["stream_overhead"] == pytest.approx(
        1 - result["stream_clips_per_second"] / result["bare_clips_per_second"]
    )
    rates = [name for name in result if "clips_per_second" in name]
    assert len(rates) == 7
    assert all(result[name] > 0 for name in rates)
    assert result["direct_longest_wait_seconds"] >= result["direct_mean_wait_seconds"] >= 0
