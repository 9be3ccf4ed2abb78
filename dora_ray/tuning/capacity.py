"""Number of trials that fit on the cluster, as it grows and shrinks.

Ray Train places a trial's workers only after its driver has started. Too many drivers would take each other's decode
CPUs and deadlock, so a trial starts only if all of it fits. On a cluster that can grow, a placement group for each
waiting trial tells the autoscaler what is missing. The group is removed as soon as it is placed; Ray also removes it
when this process ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_ray.config import Config
from dora_ray.ray_internals import has_node_types

# CPUs reserved for a trial's driver, which launches the workers and waits for them.
DRIVER_CPUS = 0.1
LOOK_SECONDS = 2.0
# Maximum number of trials requested from the autoscaler at once, and so of new nodes: it packs trials onto nodes.
ASK_AT_ONCE = 16
# Pause after a group was placed: it may have found room between two decode tasks rather than on a new node.
ASK_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Need:
    """Resources of one trial.

    Attributes:
        workers: number of its workers; 0 if the driver itself trains.
        worker: CPUs and GPUs of one worker.
        decode_cpus: CPUs for reading its clips.
    """

    workers: int
    worker: Mapping[str, float]
    decode_cpus: float

    @classmethod
    def of(cls, config: Config) -> Need:
        """Return the need of a trial with this configuration."""
        cluster = config.cluster
        worker = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})
        local = cluster.num_workers == 0
        return cls(0 if local else config.max_workers, worker, 0.0 if local else float(cluster.decode_cpus))

    @property
    def driver(self) -> dict[str, float]:
        """Resources that Ray Tune reserves for the driver: almost none unless the driver itself trains."""
        return {"CPU": DRIVER_CPUS} if self.workers else dict(self.worker)

    @property
    def cpus(self) -> float:
        """CPUs of the whole trial."""
        return self.driver["CPU"] + self.workers * self.worker["CPU"] + self.decode_cpus

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The whole trial as a placement group."""
        bundles = [self.driver, *(dict(self.worker) for _ in range(self.workers))]
        return bundles + ([{"CPU": self.decode_cpus}] if self.decode_cpus else [])


def largest(configs: Sequence[Config]) -> Need:
    """Return the need of the largest trial."""
    return max((Need.of(config) for config in configs), key=lambda need: (need.worker.get("GPU", 0), need.cpus))


def trials_that_fit(nodes: Sequence[Mapping[str, float]], need: Need) -> int:
    """Return the number of trials that fit on nodes with these resources at the same time."""
    whole = int(sum(node.get("CPU", 0.0) for node in nodes) / need.cpus + 1e-6)
    parts = need.workers or 1
    places = sum(_places(node, need.worker) for node in nodes)
    return min(whole, places // parts)


def _places(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in worker.items() if amount)


class Capacity:
    """Polls the cluster's resources, and requests more from an autoscaler for waiting trials.

    Args:
        need: need of one trial.
        most: user's limit on concurrent trials.
    """

    def __init__(self, need: Need, most: int) -> None:
        self._need, self._most = need, most
        self._grows = has_node_types()
        self._asked: list[Any] = []
        self._looked_at = self._ask_after = -ASK_AGAIN_SECONDS
        self._fit = 1

    def limit(self, waiting: int) -> int:
        """Return the number of trials that may run now, at least one; `waiting` counts those that have not ended."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            fit = max(1, self._count())
            if fit > self._fit:
                self._ask_after = now  # the cluster is growing: request more at once
            self._fit = fit
            if self._grows:
                self._ask(min(waiting, self._most) - fit, now)
        return min(self._fit, self._most)

    def _count(self) -> int:
        import ray

        return trials_that_fit([node["Resources"] for node in ray.nodes() if node["Alive"]], self._need)

    def _ask(self, missing: int, now: float) -> None:
        """Keep a pending placement group for each missing trial; remove those that were placed."""
        from ray.util import placement_group, remove_placement_group

        for group in [group for group in self._asked if group.wait(0)]:
            remove_placement_group(group)
            self._asked.remove(group)
            self._ask_after = now + ASK_AGAIN_SECONDS
        wanted = max(0, min(missing, ASK_AT_ONCE))
        while len(self._asked) > wanted:
            remove_placement_group(self._asked.pop())
        if now >= self._ask_after:
            self._asked += [placement_group(self._need.bundles) for _ in range(wanted - len(self._asked))]

    def close(self) -> None:
        """Withdraw all requests."""
        from ray.util import remove_placement_group

        while self._asked:
            remove_placement_group(self._asked.pop())
