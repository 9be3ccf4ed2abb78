"""Optimizer: schedules, parameter groups, per-parameter gradient clipping, the teacher's moving average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dora_ray.config import OptimConfig
from dora_ray.method.schedules import cosine


@dataclass(frozen=True)
class Rates:
    """Scheduled values of one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float


def rates(step: int, config: OptimConfig) -> Rates:
    """Return learning rate, weight decay and teacher momentum; they depend on the step alone."""
    return Rates(
        lr=cosine(
            step,
            start=config.lr,
            end=config.final_lr,
            num_steps=config.steps,
            warmup_steps=config.num_warmup_steps,
        ),
        weight_decay=cosine(step, start=config.weight_decay, end=config.final_weight_decay, num_steps=config.steps),
        teacher_momentum=cosine(
            step, start=config.teacher_momentum, end=config.final_teacher_momentum, num_steps=config.steps
        ),
    )


def make_optimizer(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on tensors of two or more dimensions, none on biases and norms (released)."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, values: Rates) -> None:
    """Set the optimizer's learning rate and weight decay for a step."""
    decayed, plain = optimizer.param_groups
    decayed["lr"] = plain["lr"] = values.lr
    decayed["weight_decay"] = values.weight_decay


def clip_each(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Clip each gradient to `max_norm` by its own norm (released: per parameter, not global)."""
    norms = torch.stack(torch._foreach_norm(list(gradients)))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients), list(factors.unbind()))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Update the teacher (equation 7): teacher = momentum * teacher + (1 - momentum) * student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
