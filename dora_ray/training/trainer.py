"""Ray side of a run: connect, check resources, run the elastic trainer."""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from dora_ray.checkpoints import CHECKPOINTS
from dora_ray.clips.contents import Contents
from dora_ray.cluster.growth import resources_within_reach
from dora_ray.cluster.starting import join_cluster, start_cluster
from dora_ray.config import Config
from dora_ray.errors import ClusterError, DoRAError
from dora_ray.ray_internals import has_node_types, most_resources
from dora_ray.training.worker import ray_worker
from dora_ray.training.worlds import Job, stream_settings

logger = logging.getLogger(__name__)

# Ray settings for a quick reaction to failures, preemption notices and lost nodes; values measured on Ray 2.60. They
# apply to processes started with this environment. Variables that the user has set take precedence.
FAST_RECOVERY = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}
# An elastic group starts only on nodes that are present, so a placement that takes longer will never succeed. The group
# leaves a drained node by itself (elastic.StayingNodes) before Ray Train sees the drain and waits for its deadline.
FAST_ELASTIC_RECOVERY = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "5"}
# Time out a hanging collective this much later than the stall watch, which dumps the stacks of all workers first.
COLLECTIVE_MARGIN_SECONDS = 30


@contextmanager
def connect(config: Config) -> Iterator[None]:
    """Connect to Ray while the context is open; do nothing in local mode.

    Use the cluster that this process is already connected to; else the one in RAY_ADDRESS (`ray job submit` sets it);
    else start one that ends with the context. That one gets enough logical CPUs for the workers and one decode task, so
    that a machine with few cores is slow but does not deadlock.
    """
    import ray

    settings = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if config.cluster.fast_recovery:
        settings |= FAST_RECOVERY
        settings |= FAST_ELASTIC_RECOVERY if isinstance(config.cluster.num_workers, tuple) else {}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized() or config.cluster.num_workers == 0:
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        join_cluster(address)
    else:
        _start_here(config)
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(config: Config) -> None:
    # With window shuffle the ingest continues during training: reserve a CPU for one of its tasks.
    ingest_cpus = 1.0 if config.clip.shuffle == "window" else 0.0
    workers_cpus = config.max_workers * config.cluster.cpus_per_worker
    needed = math.ceil(workers_cpus + config.cluster.decode_cpus + ingest_cpus)
    start_cluster(num_cpus=max(os.cpu_count() or 1, needed))


def on_devices(config: Config) -> Config:
    """Return the configuration with cluster.use_gpu resolved from the available GPUs; warn of GPUs that will idle.

    Call it while Ray is connected; in local mode it looks at this machine only.
    """
    if config.cluster.num_workers == 0:
        gpus, fewest, most = float(torch.cuda.device_count()), 1, 1
    else:
        workers = config.cluster.num_workers
        gpus, most = resources_within_reach().get("GPU", 0.0), config.max_workers
        fewest = workers if isinstance(workers, int) else workers[0]
    use_gpu = config.cluster.use_gpu
    if use_gpu is None:
        use_gpu = gpus >= fewest
    idle = idle_gpus(gpus, use_gpu=use_gpu, fewest=fewest, most=most, asked=config.cluster.use_gpu)
    if idle:
        logger.warning("%s", idle)
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"use_gpu": use_gpu})})


def idle_gpus(gpus: float, *, use_gpu: bool, fewest: int, most: int, asked: bool | None) -> str | None:
    """Return a warning about GPUs that no worker will use; None if there are none.

    Args:
        gpus: number of GPUs in the cluster or within the autoscaler's reach.
        use_gpu: each worker takes one GPU.
        fewest: smallest number of workers.
        most: largest number of workers.
        asked: cluster.use_gpu as configured.
    """
    used = most if use_gpu else 0
    if gpus <= used:
        return None
    idle = f"{gpus - used:g} of {gpus:g} GPUs will idle: "
    if used:
        return f"{idle}each of the {most} workers has one; raise cluster.num_workers (at most optim.slots)"
    if asked is False:
        return f"{idle}cluster.use_gpu=false; leave it out to use them"
    return f"{idle}{fewest} workers need one each; lower cluster.num_workers to {gpus:g} to use them"


def check_resources(config: Config) -> None:
    """Check that the cluster has, or can grow to, the resources of the smallest worker group.

    Raises:
        ClusterError: resources are missing; the message lists them.
    """
    import ray

    workers = config.cluster.num_workers
    if workers == 0:
        if config.cluster.use_gpu and not torch.cuda.is_available():
            raise ClusterError(
                "cluster.use_gpu=true, but torch finds no GPU on this machine: set cluster.use_gpu=false"
            )
        return
    fewest = workers if isinstance(workers, int) else workers[0]
    wanted = {"CPU": fewest * config.cluster.cpus_per_worker + config.cluster.decode_cpus}
    if config.cluster.use_gpu:
        wanted["GPU"] = float(fewest)
    present = ray.cluster_resources()
    missing = {name: count for name, count in wanted.items() if present.get(name, 0.0) < count}
    if missing and not has_node_types():
        found = ", ".join(f"{present.get(name, 0):g} {name}s" for name in missing)
        needed = ", ".join(f"{count:g} {name}s" for name, count in missing.items())
        raise ClusterError(
            f"the cluster has {found}; {fewest} workers and decoding need {needed}. Lower cluster.num_workers or "
            "cluster.cpus_per_worker, set cluster.use_gpu=false, or add nodes."
        )
    most = most_resources()  # empty unless an autoscaler has reported it
    if missing and most and (short := beyond_reach(config, most)):
        raise ClusterError(short)


def beyond_reach(config: Config, most: Mapping[str, float]) -> str | None:
    """Return the reason why an autoscaler would start no node for a training; None if it would.

    An elastic trainer requests its largest number of workers, and Ray starts no node for a demand that it cannot meet
    in full.

    Args:
        config: the run's.
        most: resources of all nodes that the node types allow.
    """
    name, each = ("GPU", 1.0) if config.cluster.use_gpu else ("CPU", config.cluster.cpus_per_worker)
    can = int(most.get(name, 0.0) / each)
    if config.max_workers <= can:
        return None
    return (
        f"cluster.num_workers asks for up to {config.max_workers} workers of {each:g} {name}s, and the cluster's node "
        f"types allow {can}: the autoscaler would start no node. Lower it, or raise max_workers of the node types"
    )


def run_on_ray(job: Job, contents: Contents) -> None:
    """Train with Ray Train to the last step, through failures and resizes.

    Args:
        job: the run.
        contents: contents of its plan.

    Raises:
        DoRAError: an error on which all ranks stopped, or more failures than cluster.max_failures.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig

    from dora_ray.clips import dataset
    from dora_ray.training.elastic.controller import Elastic, ElasticTrainer, describe, most_telling
    from dora_ray.training.elastic.spares import ENVIRONMENT

    cluster, workers, settings = job.config.cluster, job.config.cluster.num_workers, stream_settings(job)
    # In a tuple, so that Ray passes the reference itself to tasks and each process deserializes the plan once.
    reference = (ray.put(contents),)
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})
    elastic = Elastic(
        job.run,
        fast=cluster.fast_recovery,
        spares=isinstance(workers, tuple),
        patience=cluster.stall_seconds,
    )
    trainer = ElasticTrainer(
        ray_worker,
        train_loop_config={"job": job, "contents": reference},
        datasets={dataset.NAME: functools.partial(dataset.make_clips, reference, settings)},
        dataset_config=dataset.RankShards(),
        torch_config=TorchConfig(timeout_s=math.ceil(cluster.stall_seconds) + COLLECTIVE_MARGIN_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.resize_seconds,
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=job.run,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[elastic],
            worker_runtime_env={"env_vars": ENVIRONMENT},
        ),
    )
    with _terminated_like_interrupted():
        try:
            failed = trainer.fit().return_value
        except SystemExit as error:  # Ray Train raises it on Ctrl-C, after the workers have saved
            raise KeyboardInterrupt from error
        except TrainingFailedError as error:
            failures = list(getattr(error, "worker_failures", {}).values())
            why = f"after {cluster.max_failures} restarts (cluster.max_failures)" if failures else "in the controller"
            raise DoRAError(
                f"training stopped {why}; the last failure: {describe(most_telling(failures or [error]))}. "
                f"The last checkpoint is kept: fix the cause and continue with --resume --out {job.run}"
            ) from error
    if failed is not None:
        raise failed


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Treat SIGTERM, which `ray job stop` sends, like Ctrl-C: the workers save first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
