"""Forward and gradients on a GPU: equal to the loop in float32, and close to it in bf16 and fp8."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dora_ray.errors import ClusterError
from dora_ray.method.dora import slot_forward
from dora_ray.method.fp8 import Fp8Linear, use_fp8
from dora_ray.method.reference import reference_slot_forward
from dora_ray.method.vit import cls_features
from dora_ray.training.numerics import has_fp8, require_fp8
from dora_ray.training.step import initial_state, method_settings
from tests.gpu.slots import config_of, masks_of, relative_error
from tests.method.networks import PAPER, RELEASED, build_small, call, draw_slot

pytestmark = pytest.mark.gpu

VIEWS = pytest.mark.parametrize("views", ["masked", "packed"])
# Relative bounds of the loss and of a gradient. On a CPU, the errors in bf16 were 0.004 and 0.022.
BF16 = (0.02, 0.1)
# The sums are in another order.
FLOAT32 = (1e-5, 1e-3)


def of_slot(forward: Any, slot: dict[str, Tensor], settings: dict[str, Any], device: torch.device, dtype: torch.dtype):
    """Return loss and gradients of a forward of fixed small networks."""
    student, teacher = (build_small(seed, dtype=dtype).to(device) for seed in (0, 1))
    moved = {name: tensor.to(device) for name, tensor in slot.items()}
    output = call(forward, student.train(), teacher, moved, settings)
    return output, torch.autograd.grad(output.loss, list(student.parameters()), materialize_grads=True)


@VIEWS
@pytest.mark.parametrize("settings", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_equals_the_loop(device, settings, views, dtype, tolerance):
    """Each discovers the objects anew, so the masks are equal, too."""
    slot, settings = draw_slot(num_frames=4, num_objects=3, dtype=dtype), settings | {"views": views}
    ours, gradients = of_slot(slot_forward, slot, settings, device, dtype)
    theirs, expected = of_slot(reference_slot_forward, slot, settings, device, dtype)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.measures["mask_area"], theirs.measures["mask_area"], rtol=1e-6, atol=0)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(float(other.abs().max()), 1e-3))


def of_large(forward: Any, device: torch.device, masks: Tensor, *overrides: str, half: bool = False):
    """Return loss and gradients at the lengths of a ViT-S/16."""
    config = config_of("model.depth=4", *overrides)
    state, generator = initial_state(config, device), torch.Generator().manual_seed(1)
    clips, frames, count = config.optim.clips_per_slot, config.clip.num_frames, config.crops.num_locals
    size, small = config.crops.global_size, config.crops.local_size
    torch.manual_seed(3)
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        output = forward(
            state.student,
            state.teacher,
            state.center,
            method_settings(config),
            globals_=torch.randn(clips, 1, frames, 3, size, size, generator=generator).to(device),
            locals_=torch.randn(clips, count, frames, 3, small, small, generator=generator).to(device),
            heads=torch.arange(3, device=device).expand(clips, -1),
            noise=None,
            object_weight=1.0,
            masks=masks.to(device),
        )
    parameters = dict(state.student.named_parameters())
    gradients = torch.autograd.grad(output.loss, list(parameters.values()), materialize_grads=True)
    return output.loss.detach(), dict(zip(parameters, gradients, strict=True))


def assert_near(ours: tuple, theirs: tuple, loss: float, gradient: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=loss, atol=0)
    largest = max(float(one.norm()) for one in theirs[1].values())
    errors = {
        name: relative_error(one, theirs[1][name])
        for name, one in ours[1].items()
        # A nearly zero gradient consists of rounding errors only: the bias of keys has none.
        if theirs[1][name].norm() > 1e-3 * largest
    }
    assert len(errors) > 10
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= gradient, f"{worst}: {errors[worst]:.3g}; allowed {gradient}"


@VIEWS
def test_equals_the_loop_at_the_lengths_of_a_large_network(device, views):
    masks = masks_of(config_of(), 0.8)
    ours, theirs = (
        of_large(forward, device, masks, f"tracking.views={views}")
        for forward in (slot_forward, reference_slot_forward)
    )
    assert_near(ours, theirs, *FLOAT32)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_packed_views_that_keep_everything_are_the_masked_ones(device, half):
    masks = torch.ones_like(masks_of(config_of(), 0.5))
    packed, masked = (
        of_large(slot_forward, device, masks, f"tracking.views={views}", half=half) for views in ("packed", "masked")
    )
    assert_near(packed, masked, *(BF16 if half else FLOAT32))


@VIEWS
def test_bf16_is_near_float32(device, views):
    """On a GPU, packed views of many lengths use the variable-length attention kernel."""
    masks = masks_of(config_of(), 0.8)
    half, full = (of_large(slot_forward, device, masks, f"tracking.views={views}", half=half) for half in (True, False))
    assert half[0] != full[0], "bf16 was not used"
    assert_near(half, full, *BF16)


def scaled_mm_runs(device: torch.device) -> bool:
    """Some versions of torch have fp8 products on GPUs only."""
    try:
        layer = torch.nn.Linear(16, 16, device=device)
        layer.__class__ = Fp8Linear
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            layer(torch.zeros(1, 16, device=device))
    except NotImplementedError:
        return False
    return True


def test_a_teacher_in_fp8_is_near_one_in_float32_and_falls_back_to_it(device):
    if device.type == "cuda" and not has_fp8(device):
        with pytest.raises(ClusterError, match="use bf16"):
            require_fp8(device)
        return
    if not scaled_mm_runs(device):
        pytest.skip(f"torch {torch.__version__} multiplies fp8 on a GPU alone")
    require_fp8(device)
    vit = initial_state(config_of("model.depth=4"), device).teacher.backbone
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        exact = cls_features(vit, images)
        use_fp8(vit)
        again = cls_features(vit, images)
        with torch.autocast(device.type, torch.bfloat16):
            rounded = cls_features(vit, images)
    assert torch.equal(again, exact), "outside autocast it computes as ever"
    assert not torch.equal(rounded.float(), exact)
    assert float(F.cosine_similarity(rounded.float(), exact).min()) > 0.99


def test_the_loss_over_65536_outputs_is_the_loops_in_tf32(gpu):
    """Only the last layer's product is rounded to TF32's eleven bits, as in bf16 training."""
    of_outputs = partial(of_large, slot_forward, gpu, masks_of(config_of(), 0.5))
    exact = of_outputs("head.num_outputs=65536")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert_near(of_outputs("head.num_outputs=65536"), exact, 1e-3, 2e-2)
