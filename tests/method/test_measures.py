from __future__ import annotations

import math

import pytest
import torch

from dora_ray.method.measures import agreement, mask_measures, sinkhorn_residual, teacher_measures


def test_flat_targets_are_uniform_and_all_alike():
    measures = teacher_measures(torch.full((2, 3, 8), 5.0), torch.zeros(8), temperature=0.04)
    assert float(measures["teacher_entropy"]) == pytest.approx(math.log(8), rel=1e-6)
    assert float(measures["teacher_kl_uniform"]) == pytest.approx(0, abs=1e-6)
    assert float(measures["teacher_diversity"]) == pytest.approx(0, abs=1e-6)


def test_one_and_the_same_sharp_target_has_no_diversity():
    outputs = torch.zeros(2, 3, 8)
    outputs[..., 5] = 10.0
    measures = teacher_measures(outputs, torch.zeros(8), temperature=0.04)
    assert float(measures["teacher_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(measures["teacher_kl_uniform"]) == pytest.approx(math.log(8), rel=1e-6)
    assert float(measures["teacher_diversity"]) == pytest.approx(0, abs=1e-6)


def test_different_sharp_targets_have_the_diversity_of_their_number():
    measures = teacher_measures(100.0 * torch.eye(6, 8), torch.zeros(8), temperature=0.04)
    assert float(measures["teacher_diversity"]) == pytest.approx(math.log(6), rel=1e-6)


def test_entropy_is_of_the_centered_and_sharpened_outputs():
    probabilities = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    center = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    measures = teacher_measures(probabilities.log() * 0.04 + center, center, temperature=0.04)
    expected = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert float(measures["teacher_entropy"]) == pytest.approx(expected)


def test_area_and_overlap_of_masks():
    masks = torch.zeros(1, 3, 1, 10)
    masks[0, 0, 0, :4] = masks[0, 1, 0, 2:6] = 1.0
    measures = mask_measures(masks)
    assert float(measures["mask_area"]) == pytest.approx(8 / 30)
    assert float(measures["object_overlap"]) == pytest.approx((2 / 6 + 0 + 0) / 3)


def test_overlap_ends_at_one_for_equal_masks_and_at_zero_for_one_or_empty():
    masks = torch.rand(2, 1, 2, 10)
    assert float(mask_measures(masks)["object_overlap"]) == 0
    assert float(mask_measures(masks.expand(-1, 3, -1, -1))["object_overlap"]) == pytest.approx(1)
    assert float(mask_measures(torch.zeros(1, 2, 1, 4))["object_overlap"]) == 0


def test_residual_is_the_relative_error_of_the_shares():
    assignment = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]])
    assert float(sinkhorn_residual(assignment)) == pytest.approx(0.5)
    assert float(sinkhorn_residual(torch.full((2, 6, 3), 1 / 3))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_outputs", [8, 20])
def test_agreement_needs_no_outputs(num_outputs):
    generator = torch.Generator().manual_seed(1)
    features, rows = torch.randn(2, 4, 3, 8, generator=generator), torch.randn(num_outputs, 8, generator=generator)
    teacher = torch.randn(2, 3, num_outputs, generator=generator)
    expected = torch.cosine_similarity(features @ rows.T, teacher.unsqueeze(1), dim=-1).mean()
    assert float(agreement(features, rows, teacher)) == pytest.approx(float(expected), rel=1e-4)


def test_agreement_is_the_mean_cosine_with_the_same_frame():
    teacher = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    students = torch.stack([2 * teacher, -teacher, 3 * teacher, teacher], dim=1)
    assert float(agreement(students, torch.eye(8), teacher)) == pytest.approx(0.5)
    expected = torch.cosine_similarity(students, teacher.flip(1).unsqueeze(1), dim=-1).mean()
    assert float(agreement(students, torch.eye(8), teacher.flip(1))) == pytest.approx(float(expected))


def test_measures_have_no_gradient():
    outputs = torch.randn(2, 3, 8, requires_grad=True)
    measures = teacher_measures(outputs, torch.zeros(8), temperature=0.04) | mask_measures(outputs.softmax(-1)[None])
    measures |= {
        "agreement": agreement(outputs[:, None], torch.eye(8), outputs),
        "residual": sinkhorn_residual(outputs),
    }
    assert not any(measure.requires_grad or measure.ndim for measure in measures.values())
