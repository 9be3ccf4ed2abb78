"""Room for trials: on the nodes that are there, and as an autoscaler brings more."""

from __future__ import annotations

import pytest

from dora_ray.tuning.capacity import Capacity, Need, trials_that_fit

ONE_WORKER = Need(workers=1, worker={"CPU": 1.0}, decode_cpus=1.0)
TWO_GPUS = Need(workers=2, worker={"CPU": 2.0, "GPU": 1.0}, decode_cpus=2.0)
LOCAL = Need(workers=0, worker={"CPU": 1.0}, decode_cpus=0.0)


@pytest.mark.parametrize(
    ("nodes", "need", "count"),
    [
        ([{"CPU": 2.1}], ONE_WORKER, 1),
        ([{"CPU": 4.2}], ONE_WORKER, 2),
        ([{"CPU": 2.0}], LOCAL, 2),
        ([{}], ONE_WORKER, 0),
        ([{"CPU": 0.9, "GPU": 8}] * 20, ONE_WORKER, 0),
        ([{"CPU": 7, "GPU": 1}] * 2, TWO_GPUS, 1),
        ([{"CPU": 64, "GPU": 8}], TWO_GPUS, 4),
        ([{"CPU": 8, "GPU": 8}], TWO_GPUS, 1),
        ([{"CPU": 64}], TWO_GPUS, 0),
    ],
)
def test_whole_trials_are_counted(nodes, need, count):
    assert trials_that_fit(nodes, need) == count


def test_a_trial_asks_for_its_driver_workers_and_decoding():
    assert TWO_GPUS.bundles == [{"CPU": 0.1}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}]
    assert LOCAL.bundles == [{"CPU": 1.0}]


class FakeCluster(Capacity):
    """A cluster that grows by one trial for every look at which something was asked for, up to five."""

    def __init__(self, need, most, *, nodes):
        self.nodes, self.wanted, self._clock = nodes, [], 0.0
        super().__init__(need, most)
        self._grows = True

    def _count(self):
        return self.nodes

    def _ask(self, missing, now):
        self.wanted.append(missing)
        self.nodes = min(5, self.nodes + (missing > 0))


@pytest.fixture
def no_clock(monkeypatch):
    monkeypatch.setattr("dora_ray.tuning.capacity.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("dora_ray.tuning.capacity.has_node_types", lambda: True)


@pytest.mark.usefixtures("no_clock")
def test_trials_at_a_time_follow_a_cluster_that_grows_and_shrinks():
    cluster = FakeCluster(ONE_WORKER, 100, nodes=0)
    assert [cluster.limit(8) for _ in range(6)] == [1, 1, 2, 3, 4, 5]
    assert cluster.wanted == [7, 7, 6, 5, 4, 3], "what is asked for is what waits beyond what fits"
    cluster.nodes = 2
    assert cluster.limit(3) == 2
    assert FakeCluster(ONE_WORKER, 2, nodes=4).limit(8) == 2, "no more than the user allows"
