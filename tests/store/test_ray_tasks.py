"""A job of tasks as people see it in Ray's dashboard."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from dora_ray.store import ray_tasks
from dora_ray.store.segments import ingest_segment

SEGMENT = functools.partial(ingest_segment, store="/store", decoder="pyav", form=None)


def halve(item: str) -> dict[str, Any]:
    return {"half": int(item) / 2}


@pytest.mark.ray
@pytest.mark.parametrize(("task", "name"), [(SEGMENT, "Map(ingest_segment)"), (halve, "Map(halve)")])
def test_the_operator_has_the_name_of_its_task(task, name: str, ray_cluster, capsys: pytest.CaptureFixture) -> None:
    ray_tasks._dataset(["a", "b"], task, {}, None).explain()
    plan = capsys.readouterr().out
    assert f"TaskPoolMapOperator[{name}]" in plan
    assert "lambda" not in plan


@pytest.mark.ray
def test_a_task_is_given_its_item(ray_cluster) -> None:
    found = ray_tasks.run_tasks(["1", "3"], halve, node_label=None, patience_seconds=300.0)
    assert sorted(result["half"] for result in found) == [0.5, 1.5]
