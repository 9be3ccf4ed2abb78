from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_ray.method import losses
from dora_ray.method.losses import dino_loss, dora_loss, teacher_probabilities
from tests.oracles import method as oracle

B, K, L, G, T, O = 2, 3, 4, 2, 2, 7  # noqa: E741
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}


def draw(*shape: int, seed: int, scale: float = 0.3) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_views(num_objects: int = K, num_locals: int = L, num_frames: int = T) -> tuple[torch.Tensor, ...]:
    return (
        draw(B, num_objects, num_frames, O, seed=1),
        draw(B, num_locals, num_frames, O, seed=2),
        draw(B, num_frames, O, seed=3),
        draw(O, seed=4),
    )


@pytest.mark.parametrize("num_objects", [1, 3])
@pytest.mark.parametrize("num_locals", [0, 1, 4])
@pytest.mark.parametrize("num_frames", [2, 3])
def test_dora_loss_equals_the_loop(num_objects, num_locals, num_frames):
    views = draw_views(num_objects, num_locals, num_frames)
    expected = oracle.dora_loss(*(view.numpy() for view in views), (0.1, 0.04))
    assert float(dora_loss(*views, reduction="mean", **TEMPERATURES)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_objects", [1, 3])
@pytest.mark.parametrize("num_locals", [2, 4])
@pytest.mark.parametrize("num_frames", [2, 3])
def test_released_loss_equals_the_loop(num_objects, num_locals, num_frames):
    views = draw_views(num_objects, num_locals, num_frames)
    expected = oracle.released_loss(*(view.numpy() for view in views), (0.1, 0.04))
    assert float(dora_loss(*views, reduction="released", **TEMPERATURES)) == pytest.approx(expected, rel=1e-12)


def test_released_loss_ignores_the_first_local_view():
    objects, locals_, teacher, center = draw_views()
    before = dora_loss(objects, locals_, teacher, center, reduction="released", **TEMPERATURES)
    locals_[:, 0] += 5.0 * draw(B, T, O, seed=9)
    assert dora_loss(objects, locals_, teacher, center, reduction="released", **TEMPERATURES) == before
    with pytest.raises(ValueError, match="first local view"):
        dora_loss(objects, locals_[:, :1], teacher, center, reduction="released", **TEMPERATURES)


@pytest.mark.parametrize(("num_globals", "num_views"), [(2, 2), (2, 5), (1, 3)])
def test_dino_loss_equals_the_loop(num_globals, num_views):
    students, teacher = draw(B, num_views, T, O, seed=1), draw(B, num_globals, T, O, seed=2)
    center = draw(O, seed=3)
    expected = oracle.dino_loss(students.numpy(), teacher.numpy(), center.numpy(), (0.1, 0.04))
    assert float(dino_loss(students, teacher, center, **TEMPERATURES)) == pytest.approx(expected, rel=1e-12)


def test_a_view_is_never_compared_with_itself():
    """With two views, the target of the first student view is the second teacher view alone."""
    students, teacher, center = draw(B, 2, T, O, seed=1).requires_grad_(), draw(B, 2, T, O, seed=2), draw(O, seed=3)
    gradient = torch.autograd.grad(dino_loss(students, teacher, center, **TEMPERATURES), students)[0]
    teacher[:, 0] += 1.0 * draw(B, T, O, seed=5)
    changed = torch.autograd.grad(dino_loss(students, teacher, center, **TEMPERATURES), students)[0]
    assert torch.equal(gradient[:, 0], changed[:, 0])
    assert not torch.equal(gradient[:, 1], changed[:, 1])


def test_dino_loss_needs_two_views():
    with pytest.raises(ValueError, match="1 student and 1 teacher"):
        dino_loss(draw(B, 1, T, O, seed=1), draw(B, 1, T, O, seed=2), draw(O, seed=3), **TEMPERATURES)


def test_gradient_is_softmax_less_target():
    objects, locals_, teacher, center = draw_views(num_locals=0)
    objects.requires_grad_()
    teacher.requires_grad_()
    dora_loss(objects, locals_, teacher, center, reduction="mean", **TEMPERATURES).backward()
    target = torch.softmax((teacher.detach() - center) / 0.04, dim=-1).unsqueeze(1)
    expected = (torch.softmax(objects.detach() / 0.1, dim=-1) - target) / 0.1 / (B * K * T)
    torch.testing.assert_close(objects.grad, expected, rtol=1e-10, atol=1e-13)
    assert teacher.grad is None


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_loss_is_least_when_the_student_says_what_the_teacher_says(seed):
    teacher, center = draw(B, T, O, seed=seed), draw(O, seed=seed + 1)
    perfect = ((teacher - center) * 0.1 / 0.04).unsqueeze(1)
    none = perfect[:, :0]
    least = dora_loss(perfect, none, teacher, center, reduction="mean", **TEMPERATURES)
    target = teacher_probabilities(teacher, center, temperature=0.04)
    assert float(least) == pytest.approx(float(-torch.xlogy(target, target).sum(-1).mean()), rel=1e-9, abs=1e-12)
    other = dora_loss(draw(B, 1, T, O, seed=seed + 2), none, teacher, center, reduction="mean", **TEMPERATURES)
    assert other >= least


def test_constant_outputs_cost_the_logarithm_of_their_number():
    objects, locals_, teacher, center = (torch.zeros_like(view) for view in draw_views())
    loss = dora_loss(objects, locals_, teacher, center, reduction="mean", **TEMPERATURES)
    assert float(loss) == pytest.approx(math.log(O))


def test_half_precision_outputs_are_summed_in_float32():
    views = [view.bfloat16() for view in draw_views()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dora_loss(*views, reduction="mean", **TEMPERATURES)
    assert loss.dtype == torch.float32
    expected = oracle.dora_loss(*(view.double().numpy() for view in views), (0.1, 0.04))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_an_unknown_reduction_names_the_known_ones():
    with pytest.raises(ValueError, match="'mean' or 'released'"):
        dora_loss(*draw_views(), reduction="sum", **TEMPERATURES)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("reduction", ["mean", "released"])
def test_a_last_layer_in_chunks_gives_the_loss_of_its_outputs(monkeypatch, chunk, reduction):
    """Loss and gradients, for views and layer, are the same for every chunk size."""
    width = 5
    rows = draw(O, width, seed=6).requires_grad_()
    objects, locals_ = (draw(B, count, T, width, seed=count).requires_grad_() for count in (K, L))
    teacher, center = draw(B, T, O, seed=3), draw(O, seed=4)
    arguments = {"reduction": reduction, **TEMPERATURES}
    whole = dora_loss(objects @ rows.T, locals_ @ rows.T, teacher, center, **arguments)
    expected = torch.autograd.grad(whole, [objects, locals_, rows])
    monkeypatch.setattr(losses, "CHUNK_OUTPUTS", chunk * O)
    ours = dora_loss(objects, locals_, teacher, center, rows=rows, **arguments)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, [objects, locals_, rows]), expected, rtol=1e-10, atol=1e-14)
    together = torch.cat([objects, locals_], dim=1)
    baseline = dino_loss(together, teacher[:, None], center, rows=rows, **TEMPERATURES)
    torch.testing.assert_close(baseline, dino_loss(together @ rows.T, teacher[:, None], center, **TEMPERATURES))


class Largest(TorchDispatchMode):
    """Records the most elements of a tensor with an output dimension."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs, self.elements = num_outputs, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and self.num_outputs in result.shape:
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("kind", ["dora", "dino"])
def test_no_more_outputs_than_a_chunk_are_written_down(monkeypatch, kind):
    """Neither forward nor backward materializes all outputs, which would be the largest tensor in memory."""
    num_outputs, width, frames = 97, 3, 5
    rows = draw(num_outputs, width, seed=6).requires_grad_()
    objects, locals_ = (draw(1, count, frames, width, seed=count).requires_grad_() for count in (K, L))
    teacher, center = draw(1, frames, num_outputs, seed=3), draw(num_outputs, seed=4)
    # A chunk is as large as the teacher's own outputs.
    chunk = frames * num_outputs
    monkeypatch.setattr(losses, "CHUNK_OUTPUTS", chunk)
    with Largest(num_outputs) as largest:
        if kind == "dora":
            loss = dora_loss(objects, locals_, teacher, center, rows=rows, **TEMPERATURES)
        else:
            both = torch.cat([objects, locals_], dim=1)
            loss = dino_loss(both, teacher[:, None], center, rows=rows, **TEMPERATURES)
        loss.backward()
    assert largest.elements == chunk


def test_object_weight_and_absence():
    objects, locals_, teacher, center = draw_views()
    arguments = {"reduction": "mean", **TEMPERATURES}
    both = dora_loss(objects, locals_, teacher, center, **arguments)
    double = dora_loss(objects, locals_, teacher, center, object_weight=2.0, **arguments)
    without = dora_loss(objects[:, :0], locals_, teacher, center, **arguments)
    torch.testing.assert_close((double + without) / 2, both)
    with pytest.raises(ValueError, match="sums over objects"):
        dora_loss(objects[:, :0], locals_, teacher, center, reduction="released", **TEMPERATURES)
