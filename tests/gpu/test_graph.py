"""CUDA graphs: the bits of a slot computed kernel by kernel, whatever a process computed before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dora_ray.config import Config
from dora_ray.training.graph import WARM_UP_CALLS
from dora_ray.training.numerics import prepare_torch
from dora_ray.training.step import TrainState, apply_step, initial_state, slot_quantities, sum_slots
from tests.gpu.slots import NO_RECORDS, assert_equal, batch_of, config_of

pytestmark = pytest.mark.gpu

DRAWN = ("model.drop_path=0.3", "optim.reduction=exact", "optim.lr=0.01")


def state_of(device: torch.device, *overrides: str) -> tuple[TrainState, Config]:
    config = config_of(*DRAWN, *overrides)
    prepare_torch(device, config.optim, deterministic=True)
    return initial_state(config, device), config


def trained(device: torch.device, steps: int, *overrides: str) -> list[Tensor]:
    """Return weights and center after some steps of four slots."""
    state, config = state_of(device, *overrides)
    for step in range(steps):
        batches = [batch_of(config, step, slot) for slot in range(config.optim.slots)]
        apply_step(state, sum_slots(state, batches, NO_RECORDS, config, None), config)
    return [*(p.detach().clone() for p in state.student.parameters()), state.center.clone()]


def slot(state: TrainState, config: Config, step: int, number: int, *, unreadable: int = 0) -> list[Tensor]:
    batch = batch_of(config, step, number)
    batch.valid[:unreadable] = False
    return slot_quantities(state, batch, config)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.precision=bf16",),
        ("optim.precision=float32",),
        # Steps with and without objects take turns: two graphs, one memory.
        ("optim.precision=bf16", "tracking.every_steps=2"),
        ("optim.precision=bf16", "tracking.kind=random"),
        ("optim.precision=bf16", "tracking.kind=none", "crops.num_globals=2"),
        ("optim.precision=bf16", "optim.teacher_precision=fp8"),
    ],
    ids=["bf16", "float32", "every second", "random", "dino", "fp8 teacher"],
)
def test_a_training_has_the_bits_of_one_without_graphs(gpu, overrides):
    graphs, plain = (trained(gpu, 4, *overrides, f"optim.cuda_graph={word}") for word in ("true", "false"))
    assert_equal(graphs, plain)
    assert not torch.equal(graphs[-1], trained(gpu, 3, *overrides)[-1])


def test_slots_draw_their_own_random_numbers(gpu):
    """Each repetition of a graph drops the paths that its slot's seed names."""
    (state, config), (same, plain) = (state_of(gpu, f"optim.cuda_graph={word}") for word in ("true", "false"))
    for number in (0, 1, 2, 3, 0, 3):
        assert_equal(slot(state, config, 0, number), slot(same, plain, 0, number))
    assert state.graphs.number == 1
    assert same.graphs.number == 0


def test_an_unreadable_clip_frees_the_graphs_and_changes_no_bit(gpu):
    (state, config), (same, plain) = (state_of(gpu, f"optim.cuda_graph={word}") for word in ("true", "false"))
    for number in range(WARM_UP_CALLS + 1):
        slot(state, config, 0, number)
    assert state.graphs.number == 1
    assert_equal(slot(state, config, 0, 3, unreadable=1), slot(same, plain, 0, 3, unreadable=1))
    assert state.graphs.number == 0
    assert_equal(slot(state, config, 1, 0), slot(same, plain, 1, 0))
    assert state.graphs.number == 1


def test_weights_that_moved_are_the_ones_that_count(gpu):
    state, config = state_of(gpu)
    for number in range(WARM_UP_CALLS + 1):
        before = slot(state, config, 0, number)
    for parameter in state.student.parameters():
        parameter.data = 1.5 * parameter.data
    moved = slot(state, config, 0, WARM_UP_CALLS)
    assert not torch.equal(before[0], moved[0])
    other, plain = state_of(gpu, "optim.cuda_graph=false")
    other.student.load_state_dict(state.student.state_dict())
    assert_equal(moved, slot(other, plain, 0, WARM_UP_CALLS))


def test_results_survive_the_next_slot(gpu):
    state, config = state_of(gpu)
    found = [slot(state, config, 0, number) for number in (0, 1, 2, 2, 3)]
    assert_equal(found[2], found[3])
    assert not torch.equal(found[3][0], found[4][0])
