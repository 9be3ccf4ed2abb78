"""Ingest of a run that trains meanwhile (clip.shuffle=window).

No step can start before the first window is stored, so its segments are decoded on all CPUs that no training worker
reserves; later segments leave a share of these CPUs for reading clips.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dora_ray.config import Config
from dora_ray.errors import DoRAError, VideoError
from dora_ray.store.ingest import Progress, Turn, ingest_work
from dora_ray.store.ray_tasks import ray_cluster
from dora_ray.training.inputs import Inputs, frame_format
from dora_ray.video.several import refuse_unreadable

# Commit each segment when it arrives: training waits for it.
COMMIT_SECONDS = 0.0
# Share of the CPUs that no training worker reserves; kept for reading clips while segments are decoded.
READING_SHARE = 0.25
# Longest time that a finished run waits for its ingest to stop; the caller may shut Ray down next.
STOP_SECONDS = 60.0


class Ingest:
    """Ingest of a run that trains meanwhile, in its own thread.

    Args:
        config: configuration of the run.
        store: folder or URI of the frame store.
        inputs: inputs of the run.
        on_ingest: called with the progress.
        on_end: called once, with the error of a failed ingest, else with None.
    """

    def __init__(
        self,
        config: Config,
        store: str,
        inputs: Inputs,
        on_ingest: Progress | None,
        on_end: Callable[[DoRAError | None], None],
    ) -> None:
        self._config, self._store = config, store
        self._work, self._awaited = inputs.work, inputs.awaited
        self._on_ingest, self._on_end = on_ingest, on_end
        self._stop, self._ended = threading.Event(), threading.Event()
        self._failure: DoRAError | None = None
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)

    def _run(self) -> None:
        data = self._config.data
        num_videos = len({part.uri for part in self._work})
        try:
            failed = ingest_work(
                self._work,
                store=self._store,
                decoder=data.decoder,
                form=frame_format(data),
                node_label=self._config.cluster.decode_label,
                progress=self._on_ingest,
                num_videos=num_videos,
                commit_seconds=COMMIT_SECONDS,
                turns=[
                    Turn(self._awaited, tasks_beside(self._config, reading=False)),
                    Turn(len(self._work) - self._awaited, tasks_beside(self._config, reading=True)),
                ],
                stop=self._stop,
            )
            if self._stop.is_set():
                return
            # Skipping a video now would change the plan of a run that has begun.
            refuse_unreadable(list(failed.values()), num_videos, skip_unreadable=False)
        except DoRAError as error:
            self._failure = error
        except Exception as error:  # noqa: BLE001  passed on to the run that waits for segments
            self._failure = VideoError(f"the ingest ended with {type(error).__name__}: {error}")
        self._ended.set()
        self._on_end(self._failure)

    def has_ended(self) -> bool:
        """Return whether everything is stored; raise the error of a failed ingest."""
        ended = self._ended.is_set()
        if self._failure is not None:
            raise self._failure
        return ended

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ingest while the context is open."""
        if not self._work:
            # A training without workers then starts no Ray.
            self._ended.set()
            self._on_end(None)
            yield
            return
        with ray_cluster():
            self._thread.start()
            try:
                yield
            finally:
                self._stop.set()
                self._thread.join(STOP_SECONDS)


def tasks_beside(config: Config, *, reading: bool) -> int | None:
    """Return the limit of segments decoded concurrently beside training; None if the cluster can grow.

    Args:
        config: configuration of the run.
        reading: leave CPUs for reading clips.
    """
    import ray

    from dora_ray.clips.room import nodes
    from dora_ray.ray_internals import has_node_types

    if has_node_types():
        return None
    label = config.cluster.decode_label
    cpus = sum(node["Resources"].get("CPU", 0.0) for node in nodes(label))
    if label is None and config.cluster.num_workers != 0:
        cpus = ray.cluster_resources().get("CPU", 0.0) - config.max_workers * config.cluster.cpus_per_worker
    return max(1, int(cpus - (max(config.cluster.decode_cpus, READING_SHARE * cpus) if reading else 0.0)))
