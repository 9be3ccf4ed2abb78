"""Small networks and slots with structured attention, shared by the tests of the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dora_ray.method import vit
from dora_ray.method.dora import Network, SlotOutput, build_network
from dora_ray.method.settings import MethodSettings

NUM_HEADS, NUM_PATCHES, NUM_OUTPUTS = 6, 16, 12


def build_small(seed: int, *, drop_path: float = 0.0, dtype: torch.dtype = torch.float64) -> Network:
    """Build a network for 32 px in 16 patches, with large weights, so that its attention is far from flat."""
    torch.manual_seed(seed)
    network = build_network(
        name="vit_tiny_patch16_224",
        width=24,
        depth=3,
        num_heads=NUM_HEADS,
        patch_size=8,
        image_size=32,
        drop_path=drop_path,
        num_layers=3,
        hidden_width=16,
        bottleneck_width=8,
        num_outputs=NUM_OUTPUTS,
    )
    with torch.no_grad():
        for parameter in network.backbone.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return network.to(dtype)


def draw_slot(
    *, num_frames: int, num_objects: int, num_locals: int = 3, num_globals: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Draw the tensors of a slot of two clips."""
    generator = torch.Generator().manual_seed(num_frames)
    clips = torch.randn(2, num_globals, num_frames, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {
        "globals_": clips.to(dtype),
        "locals_": torch.randn(2, num_locals, num_frames, 3, 16, 16, generator=generator, dtype=torch.float64).to(
            dtype
        ),
        "heads": torch.stack([torch.randperm(NUM_HEADS, generator=generator)[:num_objects] for _ in range(2)]),
        "noise": torch.rand(2, num_objects, num_frames, NUM_PATCHES, generator=generator),
    }


def draw_center(dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a nonzero center."""
    return 0.1 * torch.randn(NUM_OUTPUTS, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


# Fields of MethodSettings, and the object weight of a step.
PAPER: dict[str, Any] = {
    "kind": "dora",
    "views": "masked",
    "block": -2,
    "normalize_patches": True,
    "num_iterations": 30,
    "epsilon": 0.05,
    "threshold": "clip",
    "student_temperature": 0.1,
    "teacher_temperature": 0.04,
    "reduction": "mean",
    "object_weight": 1.0,
    "teacher_dtype": None,
}
RELEASED = PAPER | {"block": -1, "threshold": "batch", "reduction": "released"}


def call(
    forward: Callable[..., SlotOutput],
    student: Network,
    teacher: Network,
    slot: dict[str, Any],
    settings: dict[str, Any],
) -> SlotOutput:
    """Run the forward of a slot with settings such as PAPER; the center has the slot's type."""
    fixed = {name: value for name, value in settings.items() if name != "object_weight"}
    center = draw_center(slot["locals_"].dtype).to(slot["locals_"].device)
    weight = settings["object_weight"]
    return forward(student, teacher, center, MethodSettings(**fixed), **slot, object_weight=weight)


@contextmanager
def no_numbers() -> Iterator[None]:
    """Within the block, new tensors have shape, type and device, but no data."""
    # Tensors cached between forwards must be fake inside the block, and real outside.
    vit._interpolation.cache_clear()
    with FakeTensorMode():
        yield
    vit._interpolation.cache_clear()


def without_numbers(network: Network) -> Network:
    """Replace a network's parameters by new ones: within `no_numbers` fake ones, on torch's default device."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad))
    return network
