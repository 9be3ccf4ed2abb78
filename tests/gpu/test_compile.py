"""Compiled blocks on a GPU: the results of plain ones, and equal bits for equal slots. Slow, since it compiles."""

from __future__ import annotations

import shutil

import pytest
import torch

from dora_ray.method.dora import slot_forward
from dora_ray.training.numerics import prepare_torch
from dora_ray.training.step import initial_state, slot_quantities
from tests.gpu.slots import batch_of, config_of, masks_of
from tests.gpu.test_method import BF16, FLOAT32, assert_near, of_large

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch.compile looks at all attributes
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_equal_to_plain_blocks(device, half):
    masks = masks_of(config_of(), 0.8)
    compiled, plain = (
        of_large(slot_forward, device, masks, f"optim.compile={word}", half=half) for word in ("true", "false")
    )
    assert_near(compiled, plain, *(BF16 if half else FLOAT32))


def test_a_slot_repeats_bit_for_bit(device):
    """Packed views of other lengths in between must not change the kernels."""
    config = config_of("optim.precision=bf16", "optim.compile=true", "tracking.views=packed")
    prepare_torch(device, config.optim, deterministic=True)
    state = initial_state(config, device)
    first, _, again = (slot_quantities(state, batch_of(config, 0, slot), config) for slot in (0, 1, 0))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_graph_of_compiled_blocks_repeats_their_bits(gpu):
    plain, graph = (config_of("optim.precision=bf16", "optim.compile=true", f"optim.cuda_graph={on}") for on in (0, 1))
    prepare_torch(gpu, plain.optim, deterministic=True)
    states = [initial_state(config, gpu) for config in (plain, graph)]
    for slot in (0, 1, 2, 3, 0):
        one, other = (
            slot_quantities(state, batch_of(config, 0, slot), config)
            for state, config in zip(states, (plain, graph), strict=True)
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))
    assert states[1].graphs.number == 1
