"""Schedules, clipping, decay groups and the moving average, each against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_ray.config import load_config
from dora_ray.training.optim import clip_each, make_optimizer, rates, update_teacher


def test_rates_at_the_ends() -> None:
    optim = load_config("tiny", "optim.steps=100", "optim.warmup_steps=10").optim
    first, warm, last = rates(0, optim), rates(9, optim), rates(99, optim)
    assert first.lr == 0.0
    assert warm.lr == pytest.approx(optim.lr)
    assert first.weight_decay == pytest.approx(optim.weight_decay)
    assert last.weight_decay == pytest.approx(optim.final_weight_decay, rel=1e-2)
    assert first.teacher_momentum == pytest.approx(optim.teacher_momentum)
    assert last.teacher_momentum == pytest.approx(optim.final_teacher_momentum, abs=1e-4)


def test_clipping_is_per_parameter() -> None:
    large, small = torch.full((4,), 10.0), torch.full((4,), 0.1)
    clip_each([large, small], 3.0)
    assert large.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(small, torch.full((4,), 0.1))


def test_only_tensors_of_two_dimensions_decay() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    decayed, plain = make_optimizer(network, 0.1, 0.5).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)


def test_teacher_is_the_moving_average() -> None:
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = [
        0.9 * t.detach() + 0.1 * s.detach() for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    update_teacher(teacher, student, 0.9)
    for ours, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, wanted)
