"""Schedules as plain functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math


def cosine(
    step: int, *, start: float, end: float, num_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Return a linear warm-up followed by half a cosine (the released schedule, per step instead of per epoch).

    Args:
        step: optimizer update, from 0.
        start: value at the end of the warm-up, where the cosine starts.
        end: value that the cosine reaches at num_steps, one past the last step; later steps keep it.
        num_steps: steps of the whole run, including the warm-up.
        warmup_steps: length of the warm-up, both ends included: step warmup_steps - 1 gives start, as does the next.
        warmup_start: value at step 0 of the warm-up; a warm-up of a single step is this value.

    Returns:
        The value at the step.
    """
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / max(warmup_steps - 1, 1)
    if step >= num_steps:
        return end
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
