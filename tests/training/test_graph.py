"""Bookkeeping of CUDA graphs: which slots they compute. For what they compute, see tests/gpu/test_graph.py."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_ray.config import load_config
from dora_ray.training.graph import WARM_UP_CALLS, Graphs, Inputs
from dora_ray.training.step import has_graph
from tests.conftest import SMALL


class Recorder:
    """Stands in for a GPU's recording: it repeats the computation."""

    def __init__(self, compute: Any, inputs: Inputs) -> None:
        self.compute, self.inputs = compute, inputs

    def repeat(self, inputs: Inputs) -> list[Tensor]:
        return [-one for one in self.compute(inputs)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    monkeypatch.setattr(Graphs, "_record", lambda self, compute, inputs: Recorder(compute, inputs))
    return Graphs()


WEIGHT = torch.ones(3)


def is_recorded(graphs: Graphs, kind: Hashable, weight: Tensor = WEIGHT) -> bool:
    """Return whether the kind's next slot is computed by a graph, whose sign the stand-in changes."""
    (found,) = graphs.run(kind, lambda inputs: [inputs["x"] * weight], {"x": torch.ones(3)}, [weight])
    return bool(found[0] < 0)


def test_the_first_slots_of_each_kind_are_computed_without(graphs):
    assert WARM_UP_CALLS == 2
    assert [is_recorded(graphs, kind) for kind in "abaabb"] == [False, False, False, True, False, True]
    assert graphs.number == 2


def test_weights_that_moved_are_recorded_anew(graphs):
    assert [is_recorded(graphs, "a") for _ in range(3)] == [False, False, True]
    first = graphs._recorded["a"]
    assert is_recorded(graphs, "a", torch.ones(3))
    assert graphs._recorded["a"] is not first


def test_what_was_released_is_recorded_at_the_next_slot(graphs):
    assert [is_recorded(graphs, "a") for _ in range(3)] == [False, False, True]
    graphs.release()
    assert graphs.number == 0
    assert is_recorded(graphs, "a")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), True),
        (("optim.cuda_graph=false",), False),
        (("tracking.views=packed",), False),
        (("tracking.views=packed", "tracking.kind=none"), True),
        (("optim.activation_checkpointing=true",), False),
    ],
)
def test_only_slots_of_equal_shapes_have_a_graph(words, expected):
    config = load_config("tiny", *SMALL, "tracking.views=masked", *words)
    assert has_graph(config, torch.device("cuda")) is expected
    assert not has_graph(config, torch.device("cpu"))
