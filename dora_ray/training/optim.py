"""The optimizer's pieces: parameter groups, clipping per parameter, the moving average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dora_ray.config import OptimConfig
from dora_ray.method.schedules import cosine


@dataclass(frozen=True)
class Rates:
    """The scheduled values of one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float


def rates(step: int, config: OptimConfig) -> Rates:
    """Learning rate, weight decay and teacher momentum: functions of the step alone."""
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
    """AdamW; tensors of two or more dimensions decay, biases and norms do not (released)."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, values: Rates) -> None:
    """Put a step's values into the optimizer."""
    decayed, plain = optimizer.param_groups
    decayed["lr"] = plain["lr"] = values.lr
    decayed["weight_decay"] = values.weight_decay


def clip_each(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each gradient down to `max_norm`, each by its own norm (released: per parameter, not global)."""
    norms = torch.stack(torch._foreach_norm(list(gradients)))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients), list(factors.unbind()))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Equation 7: teacher = momentum * teacher + (1 - momentum) * student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
