"""What the launcher hands to Ray Train, and what it makes of its answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.train import WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

import dora_ray
from dora_ray.clips.contents import StoredContents
from dora_ray.errors import ClusterError, DoRAError
from dora_ray.training import trainer
from dora_ray.training.trainer import FAST_ELASTIC_RECOVERY, FAST_RECOVERY, run_on_ray
from dora_ray.training.worlds import Job
from tests.conftest import SMALL
from tests.training.records.test_checkpoint import PLAN


@pytest.mark.ray
def test_one_patience_and_the_most_telling_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster
) -> None:
    trainers = []

    def fit(trainer: TorchTrainer) -> Any:
        trainers.append(trainer)
        lost = RuntimeError("Connection closed by peer: rank 1")
        raise WorkerGroupError("two ranks", {0: lost, 1: RuntimeError("The actor died: SIGKILL")})

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    config = dora_ray.load_config("tiny", *SMALL, "cluster.num_workers=2", "cluster.stall_seconds=1000")
    with pytest.raises(DoRAError, match="the last failure: The actor died"):
        run_on_ray(Job(config, PLAN, str(tmp_path)), StoredContents(PLAN, ()))
    assert trainers[0].backend_config.timeout_s > 1000, "the stall watch is to end the workers first"


def test_what_makes_recovery_fast_reaches_ray_trains_controller() -> None:
    names = {name for name in FAST_RECOVERY | FAST_ELASTIC_RECOVERY if name.startswith("RAY_TRAIN_")}
    assert names <= ENV_VARS_TO_PROPAGATE


@pytest.mark.parametrize(
    ("workers", "gpus", "asked", "uses", "says"),
    [
        ("2", 0, None, False, None),
        ("2", 2, None, True, None),
        ("2", 8, None, True, "6 of 8 GPUs will idle: each of the 2 workers has one"),
        ("2", 1, None, False, "1 of 1 GPUs will idle: 2 workers need one each; lower cluster.num_workers to 1"),
        ("2", 1, "false", False, "cluster.use_gpu=false; leave it out"),
        ("2", 0, "true", True, None),
        ("[1, 4]", 1, None, True, None),
        ("0", 2, None, True, "1 of 2 GPUs will idle"),
        ("0", 0, None, False, None),
    ],
)
def test_gpus_are_used_where_they_are_and_named_where_they_idle(monkeypatch, caplog, workers, gpus, asked, uses, says):
    monkeypatch.setattr(trainer.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(trainer, "resources_within_reach", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    words = [f"cluster.num_workers={workers}", "optim.slots=4"] + ([f"cluster.use_gpu={asked}"] if asked else [])
    placed = trainer.on_devices(dora_ray.load_config("tiny", *words))
    assert placed.cluster.use_gpu is uses
    assert says in caplog.text if says else caplog.text == ""


@pytest.mark.parametrize(
    ("workers", "words", "most", "says"),
    [
        ("[1, 8]", ["cluster.use_gpu=true"], {"CPU": 64.0, "GPU": 8.0}, None),
        ("[1, 16]", ["cluster.use_gpu=true"], {"CPU": 64.0, "GPU": 8.0}, "up to 16 workers of 1 GPUs, .* allow 8"),
        ("[1, 4]", ["cluster.cpus_per_worker=2"], {"CPU": 6.0}, "up to 4 workers of 2 CPUs, .* allow 3"),
        ("[1, 16]", ["cluster.use_gpu=true"], {}, None),
    ],
)
def test_a_demand_that_no_autoscaler_meets_is_refused(monkeypatch, workers, words, most, says):
    monkeypatch.setattr(trainer, "has_node_types", lambda: True)
    monkeypatch.setattr(trainer, "most_resources", lambda: most)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 0.0})
    config = dora_ray.load_config("tiny", f"cluster.num_workers={workers}", "optim.slots=16", *words)
    if says is None:
        trainer.check_resources(config)
        return
    with pytest.raises(ClusterError, match=says):
        trainer.check_resources(config)
