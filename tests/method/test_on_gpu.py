"""Forward as on a GPU, with fake tensors: operators, types and devices agree, and no host synchronization occurs.

Reading a value of a fake tensor raises an error; on a GPU, it would make the host wait for all queued work.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dora_ray.config import load_config
from dora_ray.method import attention
from dora_ray.method.dora import SlotOutput, slot_forward
from dora_ray.training.draws import draw_slot, render_slot, slot_inputs
from dora_ray.training.step import initial_state, method_settings
from dora_ray.views import augment
from tests.method.networks import no_numbers, without_numbers

DEPTH = 3


class Operators(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a GPU, which autocast asks for, and skip pinned memory, which needs one."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr(attention, "upload", lambda tensor, device: tensor.to(device))


def forward(*overrides: str) -> tuple[SlotOutput, Counter[str]]:
    """Return shapes of the recipe `paper`, with fewer clips and blocks."""
    config = load_config("paper", f"model.depth={DEPTH}", "optim.clips_per_slot=2", *overrides)
    state = initial_state(config, torch.device("cpu"))
    shape, crops = (2, config.clip.num_frames, 3), config.crops
    clips, *of_frames = shape
    with no_numbers(), torch.device("cuda"), Operators() as operators, torch.autocast("cuda", torch.bfloat16):
        output = slot_forward(
            without_numbers(state.student),
            without_numbers(state.teacher),
            torch.empty(config.head.num_outputs),
            method_settings(config),
            globals_=torch.empty(clips, 1, *of_frames, crops.global_size, crops.global_size),
            locals_=torch.empty(clips, crops.num_locals, *of_frames, crops.local_size, crops.local_size),
            heads=torch.zeros(clips, config.tracking.num_objects, dtype=torch.int64),
            noise=None,
            object_weight=1.0,
        )
    return output, operators.counts


@pytest.mark.parametrize(
    "override",
    [
        "tracking.threshold=clip",
        "tracking.threshold=batch",
        "tracking.threshold=soft",
        "tracking.num_iterations=0",
        "tracking.normalize_patches=true",
        "tracking.block=-1",
        "loss.reduction=released",
        "optim.teacher_precision=fp8",
    ],
)
def test_masked_views_never_synchronize_the_host_nor_copy_from_it(monkeypatch, override):
    """A CUDA graph of the forward would repeat a copy from memory that is not there any more."""
    monkeypatch.delattr(attention, "upload")
    output, _ = forward(override)
    assert output.loss.device.type == "cuda"
    assert {measure.dtype for measure in output.measures.values()} == {torch.float32}


@pytest.mark.parametrize("teacher", ["same", "fp8"])
def test_packed_views_synchronize_only_for_their_lengths(monkeypatch, teacher):
    options = ("tracking.views=packed", f"optim.teacher_precision={teacher}")
    with pytest.raises(DataDependentOutputException):
        forward(*options)

    def lengths(tensor: Tensor) -> list[int]:
        """Return lengths of 2 clips of 8 frames and 3 objects, including CLS."""
        assert tensor.shape == (2 * 8 * 3,)
        return sorted(1 + number * 37 % 180 for number in range(len(tensor)))

    monkeypatch.setattr(FakeTensor, "tolist", lengths)
    output, counts = forward(*options)
    assert output.loss.device.type == "cuda"
    assert counts["_varlen_attn"] == DEPTH
    # Four layers in each of the teacher's blocks but the last.
    assert counts["_scaled_mm_v2"] == (4 * (DEPTH - 1) if teacher == "fp8" else 0)


def test_views_are_rendered_without_a_wait_or_a_copy_from_the_host():
    config = load_config("paper", "optim.clips_per_slot=2")
    draws = draw_slot(config, 0, 0)
    size, device = config.crops.clip_size, torch.device("cuda")
    clips, valid = np.zeros((2, config.clip.num_frames, size, size, 3), np.uint8), np.ones(2, bool)
    inputs = slot_inputs(clips, valid, draws, torch.device("cpu"))
    augment._constants.cache_clear()
    try:
        with no_numbers():
            fake = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for name, tensor in inputs.items()
            }
            globals_, locals_ = render_slot(fake, config.crops)
    finally:
        augment._constants.cache_clear()
    assert globals_.shape == (2, 1, config.clip.num_frames, 3, 224, 224)
    assert locals_.shape == (2, config.crops.num_locals, config.clip.num_frames, 3, 96, 96)
    assert globals_.device.type == locals_.device.type == "cuda"
