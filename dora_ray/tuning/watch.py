"""Ray Tune callback of a sweep: concurrency limit, progress, failures, report page."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from ray import tune

from dora_ray import files
from dora_ray.tuning.capacity import Capacity
from dora_ray.tuning.driver import FAILED, write_error
from dora_ray.tuning.progress import POINTS, SweepProgress, read_points
from dora_ray.tuning.results import stopped_file, trial_status
from dora_ray.tuning.space import SweepSpec, name_of, with_seed

logger = logging.getLogger(__name__)

OnProgress = Callable[[SweepProgress], None]
# The page is written when a trial ends, at most this often and for at most a tenth of the time: it blocks Ray Tune's
# loop, and with it every trial that has a line to report.
PAGE_SECONDS, PAGE_REST = 30.0, 9.0


class Watch(tune.Callback):
    """Follows the trials of one sweep.

    Args:
        folder: the sweep's folder.
        spec: the sweep's file.
        search: Ray Tune's search algorithm; its `max_concurrent` follows the cluster.
        capacity: the cluster's capacity for trials.
        progress: updated while trials run.
        write_pages: called when trials end.
        on_progress: called with every update.
    """

    def __init__(
        self,
        folder: str,
        spec: SweepSpec,
        *,
        search: Any,
        capacity: Capacity,
        progress: SweepProgress,
        write_pages: Callable[[], object],
        on_progress: OnProgress | None,
    ) -> None:
        self._folder, self._spec, self._search = folder, spec, search
        self._capacity, self._progress = capacity, progress
        self._write_pages, self._on_progress = write_pages, on_progress
        self._running: dict[str, None] = {}
        # Only Optuna's points need to be saved: all others follow from the sweep file.
        self._points = files.LineFile(files.join(folder, POINTS)) if spec.search == "tpe" else None
        self._known = {name_of(values) for values in read_points(folder)}
        self._page_after = time.monotonic() + PAGE_SECONDS

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        """Pickle as an empty callback, so that Ray Tune can restore its state without this process."""
        return tune.Callback, ()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Update the concurrency limit and status.json on every iteration of Ray Tune's loop."""
        self._search.max_concurrent = self._capacity.limit(self._progress.trials - len(self._progress.ended))
        self._progress.write("running", list(self._running))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial starts or restarts."""
        name, values = self._name(trial), with_seed(trial.config, self._spec)
        self._running[name] = None
        if self._points is not None and name not in self._known:
            self._known.add(name)
            self._points.append(json.dumps({"name": name, "values": values}))
            self._points.flush()
        self._progress.start(name)
        self._tell()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a line of a trial's metrics, or its failure report, after which it is not retried."""
        if result.get(FAILED):
            trial.max_failures = 0
        elif "step" in result:
            self._progress.step(self._name(trial), int(result["step"]))
            self._tell()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log that a trial's driver was lost and restarts."""
        logger.warning(
            "trial %s lost its driver (%s of %s): it continues from its checkpoint",
            self._name(trial),
            trial.run_metadata.num_failures,
            trial.max_failures,
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial is done or was stopped by the scheduler."""
        name = self._name(trial)
        if trial_status(self._folder, name) != "done":
            files.write_text(stopped_file(self._folder, name), "")
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial has failed for good."""
        name = self._name(trial)
        if trial_status(self._folder, name) == "missing":
            write_error(self._folder, name, trial.get_pickled_error() or RuntimeError("its process was lost"))
        self._end(trial)

    def _end(self, trial: Any) -> None:
        name = self._name(trial)
        self._running.pop(name, None)
        status = trial_status(self._folder, name)
        self._progress.end(name, status)
        if status == "failed":
            logger.warning("trial %s failed: see %s", name, files.join(self._folder, "errors", f"{name}.txt"))
        self._tell()
        began = time.monotonic()
        if began >= self._page_after:
            self._write_pages()
            ended = time.monotonic()
            self._page_after = ended + max(PAGE_SECONDS, PAGE_REST * (ended - began))

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._progress)

    def _name(self, trial: Any) -> str:
        return name_of(with_seed(trial.config, self._spec))
