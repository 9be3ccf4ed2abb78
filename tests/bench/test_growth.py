"""Memory over a stream: slopes from samples, and process roles from command lines."""

from __future__ import annotations

import pytest

from dora_ray.bench.cluster import role_of
from dora_ray.bench.growth import Growth


def test_a_slope_is_of_what_comes_after_the_start() -> None:
    growth = Growth()
    for number in range(11):
        growth.slots.append(1000 * number)
        growth.memory.append({"raylet": 50.0 if number < 2 else 100.0 + number, "driver": 7.0})
    roles = growth.roles()
    assert roles["raylet"] == pytest.approx(
        {"settled_mb": 102.0, "end_mb": 110.0, "most_mb": 110.0, "mb_a_million_slots": 1000.0}
    )
    assert roles["driver"]["mb_a_million_slots"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (["ray::SplitCoordinator.get", "", ""], "SplitCoordinator"),
        (["ray::_StatsActor    "], "_StatsActor"),
        (["ray::IDLE"], "task"),
        (["/env/bin/python", "/env/ray/_private/workers/default_worker.py", "--node-ip-address=10.0.0.1"], None),
        ([], None),
        (["ray::MapBatches(RowReader)"], "task"),
        (["ray::ReadSlotRows"], "task"),
        (["/env/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=a"], "raylet"),
        (["/env/bin/python", "-u", "/env/ray/dashboard/dashboard.py"], "dashboard.py"),
    ],
)
def test_processes_are_named(words: list[str], role: str | None) -> None:
    assert role_of(words) == role
