"""Room for trials, now and as the cluster grows or shrinks.

A trial's workers are placed by Ray Train when its driver runs already: with more drivers than there is room for, they
would take each other's decode CPUs and wait for ever. So trials begin only where a whole one fits. On a cluster that
can grow, a placement group for each trial that waits tells the autoscaler what is missing; it is given up as soon as it
is there, and goes with this process however that ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_ray.config import Config
from dora_ray.ray_internals import has_node_types

# What Ray reserves for the process that launches a trial's workers and then waits for them.
DRIVER_CPUS = 0.1
LOOK_SECONDS = 2.0
# Trials that room is asked for at once: the autoscaler packs them, and asks for that many nodes at most.
ASK_AT_ONCE = 16
# A group that was there at once found room between two decode tasks, not a new node.
ASK_AGAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Need:
    """Resources of one trial.

    Attributes:
        workers: how many it trains with; 0 where its driver trains.
        worker: CPUs and GPUs of one worker.
        decode_cpus: CPUs of its reading of clips.
    """

    workers: int
    worker: Mapping[str, float]
    decode_cpus: float

    @classmethod
    def of(cls, config: Config) -> Need:
        """Return what a trial of this configuration needs."""
        cluster = config.cluster
        worker = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})
        local = cluster.num_workers == 0
        return cls(0 if local else config.max_workers, worker, 0.0 if local else float(cluster.decode_cpus))

    @property
    def driver(self) -> dict[str, float]:
        """Resources that Ray Tune reserves for the driver: nearly none, except where the driver itself trains."""
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
    """The need that no trial exceeds."""
    return max((Need.of(config) for config in configs), key=lambda need: (need.worker.get("GPU", 0), need.cpus))


def trials_that_fit(nodes: Sequence[Mapping[str, float]], need: Need) -> int:
    """Count the trials that fit beside each other on nodes with these resources."""
    whole = int(sum(node.get("CPU", 0.0) for node in nodes) / need.cpus + 1e-6)
    parts = need.workers or 1
    places = sum(_places(node, need.worker) for node in nodes)
    return min(whole, places // parts)


def _places(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in worker.items() if amount)


class Capacity:
    """Looks at the cluster now and then, and asks an autoscaler for what waiting trials need.

    Args:
        need: of one trial.
        most: trials at a time that the user allows.
    """

    def __init__(self, need: Need, most: int) -> None:
        self._need, self._most = need, most
        self._grows = has_node_types()
        self._asked: list[Any] = []
        self._looked_at = self._ask_after = -ASK_AGAIN_SECONDS
        self._fit = 1

    def limit(self, waiting: int) -> int:
        """Count the trials that may run now, at least one; `waiting` is how many have not ended."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            fit = max(1, self._count())
            if fit > self._fit:
                self._ask_after = now  # there may be more where this came from
            self._fit = fit
            if self._grows:
                self._ask(min(waiting, self._most) - fit, now)
        return min(self._fit, self._most)

    def _count(self) -> int:
        import ray

        return trials_that_fit([node["Resources"] for node in ray.nodes() if node["Alive"]], self._need)

    def _ask(self, missing: int, now: float) -> None:
        """Keep a pending placement group for each missing trial; give back those that have found room."""
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
        """Ask for nothing more."""
        from ray.util import remove_placement_group

        while self._asked:
            remove_placement_group(self._asked.pop())
