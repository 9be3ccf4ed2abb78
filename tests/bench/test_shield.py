"""The measurement of the shield's cost: what it prints, on a film of seconds."""

from __future__ import annotations

import pytest

from dora_ray.bench import shield


def test_without_rounds_nothing_needs_ray():
    found = shield.run(rounds=0, starts=1)
    assert set(found) == {"start_cpu_seconds", "memory_limit_us"}
    assert found["start_cpu_seconds"] > 0.1, "Ray and Lance are imported"
    assert found["memory_limit_us"] > 0


@pytest.mark.slow
@pytest.mark.ray
def test_both_ways_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    size = {"width": 320, "height": 180, "frames_per_second": 24, "seconds": 4, "group_size": 48}
    found = shield.run(rounds=1, size=size, loops=2, starts=1)
    assert found["film_seconds"] == 8
    for unit in ("seconds", "cpu_seconds"):
        shielded, plain = found[f"shielded_{unit}"], found[f"plain_{unit}"]
        assert found[f"ratio_of_{unit}"] == shielded / plain > 0
        assert found[f"extra_{unit}"] == shielded - plain
    assert 0 < found["memory_limit_us"] < 1e5
    assert {name: len(each) for name, each in found["rounds"].items()} == {"plain": 1, "shielded": 1}
