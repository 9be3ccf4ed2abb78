from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dora_ray.method.dora import slot_forward
from dora_ray.method.objects import track_objects
from dora_ray.method.reference import naive_features, naive_maps, naive_masks, reference_slot_forward
from dora_ray.method.vit import tracked_features
from tests.method.networks import NUM_OUTPUTS, PAPER, RELEASED, build_small, call, draw_slot
from tests.oracles import method as oracle

ALWAYS = {"loss", "teacher_entropy", "teacher_kl_uniform", "teacher_diversity"}
OF_OBJECTS = {"mask_area", "object_overlap", "sinkhorn_residual", "object_agreement"}


def run(forward, slot, settings, *, dtype=torch.float64):
    """Return results and gradients of a forward on fixed networks."""
    student, teacher = build_small(0, dtype=dtype).train(), build_small(1, dtype=dtype)
    output = call(forward, student, teacher, slot, settings)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in student.named_parameters()}


def assert_same(slot, settings, *, dtype, tolerance):
    """The fast forward equals the loop in loss, gradients, teacher sum and measures."""
    ours, gradients = run(slot_forward, slot, settings, dtype=dtype)
    theirs, expected = run(reference_slot_forward, slot, settings, dtype=dtype)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=0)
    for name, gradient in expected.items():
        error, scale = float((gradients[name] - gradient).abs().max()), max(float(gradient.abs().max()), 1e-3)
        assert error <= tolerance * scale, f"{name} is off by {error} of {scale}"
    torch.testing.assert_close(ours.teacher_sum, theirs.teacher_sum)
    assert ours.measures.keys() == theirs.measures.keys()
    for name, measure in theirs.measures.items():
        torch.testing.assert_close(ours.measures[name], measure, rtol=10 * tolerance, atol=10 * tolerance)


BOTH = pytest.mark.parametrize("settings", [PAPER, RELEASED], ids=["paper", "released"])
VIEWS = pytest.mark.parametrize("views", ["masked", "packed"])


# All numbers of objects of six heads, and all numbers of frames up to eight.
SIZES = [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (3, 8)]


@BOTH
@VIEWS
@pytest.mark.parametrize(("num_objects", "num_frames"), SIZES)
def test_equals_the_loop(settings, views, num_objects, num_frames):
    slot = draw_slot(num_frames=num_frames, num_objects=num_objects)
    assert_same(slot, settings | {"views": views}, dtype=torch.float64, tolerance=1e-9)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("num_objects", "num_frames"),
    [(objects, frames) for objects in range(1, 7) for frames in range(2, 9) if (objects + frames) % 3 == 0],
)
def test_equals_the_loop_for_pairs_of_sizes(settings, num_objects, num_frames):
    slot = draw_slot(num_frames=num_frames, num_objects=num_objects)
    assert_same(slot, settings, dtype=torch.float64, tolerance=1e-9)


@BOTH
@VIEWS
@pytest.mark.parametrize(("num_objects", "num_frames"), SIZES)
def test_equals_the_loop_in_float32(settings, views, num_objects, num_frames):
    slot = draw_slot(num_frames=num_frames, num_objects=num_objects, dtype=torch.float32)
    assert_same(slot, settings | {"views": views}, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "random"},
        {"kind": "random", "threshold": "soft"},
        {"num_iterations": 0},
        {"num_iterations": 0, "reduction": "released"},
        {"threshold": "soft"},
        {"normalize_patches": False, "epsilon": 5.0},
        {"block": -3},
        {"object_weight": 3.0},
        {"kind": "random", "views": "packed"},
    ],
    ids=str,
)
def test_every_switch_equals_the_loop(changes):
    slot = draw_slot(num_frames=2, num_objects=3)
    assert_same(slot, PAPER | changes, dtype=torch.float64, tolerance=1e-9)


@BOTH
@VIEWS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_given_masks_equal_the_loop(settings, views, dtype, tolerance):
    """Given masks of any size, including a single patch and all patches, replace the objects' own."""
    slot = draw_slot(num_frames=3, num_objects=3, dtype=dtype)
    masks = (torch.rand(2, 3, 3, 16, generator=torch.Generator().manual_seed(5)) < 0.4).to(dtype)
    masks[0, 0, 0], masks[1, 2, 1] = 0.0, 1.0
    masks[0, 0, 0, 7] = 1.0
    assert_same(slot | {"masks": masks}, settings | {"views": views}, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize(("num_globals", "num_locals"), [(2, 0), (2, 3), (1, 3)])
def test_the_baseline_equals_the_loop(num_globals, num_locals):
    slot = draw_slot(num_frames=2, num_objects=1, num_locals=num_locals, num_globals=num_globals)
    assert_same(slot, PAPER | {"kind": "none"}, dtype=torch.float64, tolerance=1e-9)


@BOTH
@VIEWS
def test_without_local_views_equals_the_loop(settings, views):
    slot = draw_slot(num_frames=2, num_objects=3, num_locals=0)
    assert_same(slot, settings | {"views": views}, dtype=torch.float64, tolerance=1e-9)


@BOTH
@pytest.mark.parametrize("num_objects", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masks_are_the_loops(settings, num_objects, dtype):
    slot = draw_slot(num_frames=4, num_objects=num_objects, dtype=dtype)
    frames, vit = slot["globals_"][:, 0], build_small(1, dtype=dtype).backbone.eval()
    rules = {name: settings[name] for name in ("normalize_patches", "num_iterations", "epsilon")}
    with torch.no_grad():
        tracked = tracked_features(vit, frames, block=settings["block"])
        ours = track_objects(tracked, slot["heads"], threshold=settings["threshold"], **rules)
        features = [naive_features(vit, frame) for frame in frames.transpose(0, 1)]
        maps, _ = naive_maps(features, slot["heads"], block=settings["block"], **rules)
    assert torch.equal(ours.masks, naive_masks(maps, settings["threshold"]))
    assert 0.05 < float(ours.masks.mean()) < 0.95
    if num_objects > 1:
        assert not torch.equal(ours.masks[:, 0], ours.masks[:, 1])


def test_tracking_equals_the_oracles_one_after_the_other():
    slot = draw_slot(num_frames=3, num_objects=3)
    vit = build_small(1).backbone.eval()
    with torch.no_grad():
        tracked = tracked_features(vit, slot["globals_"][:, 0], block=-2)
        ours = track_objects(
            tracked, slot["heads"], normalize_patches=True, num_iterations=5, epsilon=0.05, threshold="clip"
        )
    attention = np.stack([tracked.cls_attention0[b, heads].numpy() for b, heads in enumerate(slot["heads"])])
    patches = F.normalize(tracked.patches0, dim=-1).numpy()
    prototypes = oracle.object_prototypes(attention, tracked.query0.numpy())
    maps = oracle.attention_maps(oracle.refine_prototypes(prototypes, patches, 0.05, 5), tracked.key.numpy())
    np.testing.assert_allclose(ours.maps, maps, rtol=1e-9)
    np.testing.assert_array_equal(ours.masks, oracle.object_masks(maps, "clip"))


@pytest.mark.parametrize("kind", ["dora", "random", "none"])
@pytest.mark.parametrize("num_locals", [0, 3])
def test_measures_are_detached_finite_scalars(kind, num_locals):
    num_globals = 2 if kind == "none" else 1
    slot = draw_slot(num_frames=2, num_objects=3, num_locals=num_locals, num_globals=num_globals)
    output, _ = run(slot_forward, slot, PAPER | {"kind": kind})
    expected = ALWAYS | ({"global_agreement"} if kind == "none" else OF_OBJECTS)
    assert set(output.measures) == expected | ({"local_agreement"} if num_locals else set())
    assert all(m.ndim == 0 and not m.requires_grad and m.isfinite() for m in output.measures.values())
    assert output.teacher_sum.shape == (NUM_OUTPUTS,)
    assert output.teacher_sum.dtype == torch.float32


def test_without_weight_no_objects_are_looked_for():
    """The remaining loss is that of the local views, at half weight as beside objects."""
    slot = draw_slot(num_frames=2, num_objects=3)
    ours, gradients = run(slot_forward, slot, PAPER | {"object_weight": 0.0})
    theirs, expected = run(reference_slot_forward, slot, PAPER | {"object_weight": 0.0})
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-9, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)
    assert set(ours.measures) == ALWAYS | {"local_agreement"}


def test_recomputed_activations_give_the_same_gradients():
    """Equal bit for bit, including drop path: the backward redraws the forward's random numbers."""
    slot = draw_slot(num_frames=2, num_objects=3)

    def gradients(settings, *, recompute):
        student, teacher = build_small(0, drop_path=0.5).train(), build_small(1)
        student.backbone.set_grad_checkpointing(recompute)
        torch.manual_seed(3)
        call(slot_forward, student, teacher, slot, settings).loss.backward()
        return [parameter.grad for parameter in student.parameters()]

    for views in ("masked", "packed"):
        kept = gradients(PAPER | {"views": views}, recompute=False)
        again = gradients(PAPER | {"views": views}, recompute=True)
        assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


@VIEWS
def test_drop_path_is_a_function_of_the_seed(views):
    slot = draw_slot(num_frames=2, num_objects=3)

    student, teacher = build_small(0, drop_path=0.5).train(), build_small(1)

    def loss(seed):
        torch.manual_seed(seed)
        return call(slot_forward, student, teacher, slot, PAPER | {"views": views}).loss.item()

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_a_teacher_in_bfloat16_leaves_the_student_as_it_is():
    slot = draw_slot(num_frames=2, num_objects=3, dtype=torch.float32)
    exact, _ = run(slot_forward, slot, PAPER, dtype=torch.float32)
    rounded, gradients = run(slot_forward, slot, PAPER | {"teacher_dtype": torch.bfloat16}, dtype=torch.float32)
    assert float(rounded.measures["loss"]) == pytest.approx(float(exact.measures["loss"]), rel=0.05)
    assert not torch.equal(rounded.teacher_sum, exact.teacher_sum)
    torch.testing.assert_close(rounded.teacher_sum, exact.teacher_sum, rtol=0.05, atol=0.05)
    assert rounded.loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_the_teachers_sum_is_over_its_own_outputs():
    slot = draw_slot(num_frames=2, num_objects=3)
    output, _ = run(slot_forward, slot, PAPER)
    with torch.no_grad():
        outputs = build_small(1).eval()(slot["globals_"].flatten(0, 2))
    torch.testing.assert_close(output.teacher_sum, outputs.sum(dim=0).float())


def test_random_masks_have_the_objects_area_elsewhere():
    slot = draw_slot(num_frames=2, num_objects=3)
    tracked, _ = run(slot_forward, slot, PAPER)
    placed, _ = run(slot_forward, slot, PAPER | {"kind": "random"})
    assert placed.measures["mask_area"] == tracked.measures["mask_area"]
    assert placed.loss != tracked.loss


def test_draws_nothing_and_leaves_the_teacher_alone():
    slot = draw_slot(num_frames=2, num_objects=3)
    student, teacher = build_small(0), build_small(1, drop_path=0.9).train()
    before = torch.random.get_rng_state()
    output = call(slot_forward, student, teacher, slot, PAPER)
    assert torch.equal(torch.random.get_rng_state(), before)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_clips_of_a_slot_do_not_mix():
    """The loss of two clips is the mean of their losses; only the threshold "batch" looks across clips."""
    slot = draw_slot(num_frames=2, num_objects=3)
    both, _ = run(slot_forward, slot, PAPER)
    alone = [run(slot_forward, {name: value[b : b + 1] for name, value in slot.items()}, PAPER)[0] for b in range(2)]
    torch.testing.assert_close(both.loss, (alone[0].loss + alone[1].loss) / 2)


@BOTH
def test_bfloat16_autocast_keeps_the_tracker_and_the_loss_in_float32(settings):
    slot = draw_slot(num_frames=2, num_objects=3, dtype=torch.float32)
    exact, _ = run(slot_forward, slot, settings, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, gradients = run(slot_forward, slot, settings, dtype=torch.float32)
        tracked = tracked_features(build_small(1, dtype=torch.float32).backbone, slot["globals_"][:, 0], block=-2)
        rules = {name: settings[name] for name in ("normalize_patches", "num_iterations", "epsilon", "threshold")}
        objects = track_objects(tracked, slot["heads"], **rules)
    assert tracked.key.dtype == torch.bfloat16
    assert objects.maps.dtype == objects.masks.dtype == rounded.loss.dtype == torch.float32
    torch.testing.assert_close(objects.maps.sum(dim=-1), torch.ones(2, 3, 2), rtol=0, atol=1e-6)
    assert float(rounded.measures["loss"]) == pytest.approx(float(exact.measures["loss"]), rel=0.05)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("slot_changes", "settings", "message"),
    [
        ({}, {"kind": "object"}, "use 'dora', 'random' or 'none'"),
        ({"noise": None}, {"kind": "random"}, "noise=None"),
        ({}, {"views": "cropped"}, "use 'masked' or 'packed'"),
        ({"globals_": torch.zeros(2, 2, 2, 3, 32, 32)}, {}, "2 global views"),
    ],
)
def test_invalid_combinations_are_refused(slot_changes, settings, message):
    slot = draw_slot(num_frames=2, num_objects=3) | slot_changes
    with pytest.raises(ValueError, match=message):
        run(slot_forward, slot, PAPER | settings)
