"""Map one function over many items on the cluster: a Ray Data job with one task per item, results as they finish."""

from __future__ import annotations

import functools
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dora_ray.cluster.starting import start_cluster
from dora_ray.errors import ClusterError
from dora_ray.ray_internals import call_each_turn, quiet_data

Task = Callable[[str], dict[str, Any]]

# Jobs whose caller has stopped waiting, by name: Ray Data copies the state of its callbacks, so an event would not
# work.
_ABANDONED: set[str] = set()
LOOK_SECONDS = 0.5
# Time that an abandoned job gets to end its tasks; the caller may shut Ray down next.
END_SECONDS = 20.0


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Use the caller's Ray cluster, or start a local one that ends with the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    start_cluster()
    try:
        yield
    finally:
        ray.shutdown()


def run_tasks(
    items: Sequence[str],
    task: Task,
    *,
    node_label: str | None,
    patience_seconds: float,
    max_tasks: int | None = None,
    variables: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the result of `task` for each item as soon as it arrives; a result is a flat dict of plain values.

    Args:
        items: one argument for each task.
        task: runs in a process of the cluster; retried if a process or a node dies.
        node_label: value of the node label `role` that tasks are pinned to; None: any node.
        patience_seconds: longest time without any task ending.
        max_tasks: limit of concurrent tasks; None: no limit.
        variables: environment variables of the tasks' processes, overriding the cluster's.
        stop: set by another thread to stop the job.

    Raises:
        ClusterError: no task has ended for `patience_seconds`.
    """
    results: queue.Queue[Any] = queue.Queue()
    job = uuid.uuid4().hex
    options = _options(node_label, variables or {})
    arguments = (items, task, options, max_tasks, results, job)
    thread = threading.Thread(target=_consume, args=arguments, name="dora-ray-tasks", daemon=True)
    thread.start()
    try:
        for done in range(len(items)):
            try:
                result = _next(results, patience_seconds, stop or threading.Event())
            except queue.Empty:
                place = f" on nodes with the label role={node_label}" if node_label else ""
                raise ClusterError(
                    f"{len(items) - done} of {len(items)} parts of the work are left, and none has finished in"
                    f" {patience_seconds:.0f} s; finished work is kept. Check for free CPUs{place} (ray status), and"
                    " start again"
                ) from None
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
        thread.join()
    finally:
        if thread.is_alive():
            _ABANDONED.add(job)
            thread.join(END_SECONDS)


def _next(results: queue.Queue[Any], patience_seconds: float, stop: threading.Event) -> Any:
    """Return the next result; None once `stop` is set.

    Raises:
        queue.Empty: no result has arrived for `patience_seconds`.
    """
    give_up = time.monotonic() + patience_seconds
    while not stop.is_set():
        try:
            return results.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            if time.monotonic() > give_up:
                raise
    return None


def _consume(
    items: Sequence[str],
    task: Task,
    options: dict[str, Any],
    max_tasks: int | None,
    results: queue.Queue[Any],
    job: str,
) -> None:
    try:
        dataset = _dataset(items, task, options, max_tasks)
        call_each_turn(dataset.context, lambda: _abort_if_abandoned(job))
        # With a batch to prefetch, a result is handed over no sooner than the next one.
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            for row in batch.to_pylist():
                results.put(row)
    except Exception as error:  # noqa: BLE001  re-raised in run_tasks, by the consumer
        results.put(error)
    finally:
        _ABANDONED.discard(job)


def _abort_if_abandoned(job: str) -> None:
    """Abort a job whose caller has stopped waiting; otherwise it could wait for nodes forever."""
    from ray.data.exceptions import ExecutionTimeoutError

    if job in _ABANDONED:
        # If there is no result yet, Ray Data shows users the stack of any other error.
        raise ExecutionTimeoutError("the job was abandoned")


def _options(node_label: str | None, variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of each Ray task."""
    pinned = {"label_selector": {"role": node_label}} if node_label else {}
    return {**pinned, **({"runtime_env": {"env_vars": dict(variables)}} if variables else {})}


def _dataset(items: Sequence[str], task: Task, options: dict[str, Any], max_tasks: int | None) -> Any:
    """Build a dataset of one block and one task per item, so that a retry repeats one item."""
    import ray.data

    quiet_data()  # the caller reports progress
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items)).map(
        _of_row(task), num_cpus=_task_cpus(), compute=ray.data.TaskPoolStrategy(max_tasks), **options
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


def _of_row(task: Task) -> Callable[[dict[str, str]], dict[str, Any]]:
    """Wrap the task for dataset rows, keeping its name: Ray's dashboard names the operator after it."""

    def of_row(row: dict[str, str]) -> dict[str, Any]:
        return task(row["item"])

    of_row.__name__ = task.func.__name__ if isinstance(task, functools.partial) else getattr(task, "__name__", "task")
    return of_row


def _task_cpus() -> float:
    """Return one CPU per task, or half of one on a single-core cluster, whose only core the caller may occupy."""
    import ray

    return 1.0 if ray.cluster_resources().get("CPU", 0.0) >= 2 else 0.5
