"""One optimizer step: forward and backward for each slot, one exact sum over slots and ranks, one update.

This module does not use Ray: a worker passes in the clips of its slots and a function that adds tensors over ranks.
Shapes: M clips a slot, T frames, G global and L local views, K objects, N patches, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_ray.clips.plan import Purpose, slot_seed
from dora_ray.config import Config
from dora_ray.errors import DivergenceError
from dora_ray.method.blocks import compile_blocks
from dora_ray.method.dora import Network, SlotOutput, build_network, slot_forward
from dora_ray.method.fp8 import use_fp8
from dora_ray.method.parts import part
from dora_ray.method.settings import MethodSettings
from dora_ray.training.draws import SlotDraws, draw_slot, object_weight, render_slot, slot_inputs
from dora_ray.training.graph import Graphs
from dora_ray.training.memory import tokens_of_slot
from dora_ray.training.optim import Rates, clip_each, make_optimizer, rates, set_rates, update_teacher
from dora_ray.training.reduction import AllReduce, SlotSums, SumResult, next_exponents, raised_exponents
from dora_ray.weights import initial_values, network_arguments

if TYPE_CHECKING:
    from dora_ray.clips.slot import SlotBatch

SlotForward = Callable[..., SlotOutput]


@dataclass
class TrainState:
    """Training state: everything that a step updates, and what a process keeps for its next step.

    Attributes:
        student: the trained network.
        teacher: moving average of the student.
        center: (O,) moving average of the teacher's output.
        optimizer: AdamW of the student.
        exponents: (Q,) int32, scale of each summed quantity; see `reduction`.
        step: steps done; it alone is the position in the data.
        bad_clips: numbers of the clips that could not be read and added no loss.
        graphs: CUDA graphs of the slots, which a checkpoint does not store.
    """

    student: Network
    teacher: Network
    center: Tensor
    optimizer: torch.optim.AdamW
    exponents: Tensor
    step: int = 0
    bad_clips: list[int] = field(default_factory=list)
    graphs: Graphs = field(default_factory=Graphs)


def initial_state(config: Config, device: torch.device) -> TrainState:
    """Return the state at step 0: equal student and teacher, initialized from the seed alone."""
    torch.manual_seed(slot_seed(config.run.seed, 0, 0, Purpose.INITIAL_WEIGHTS))
    dumped = config.model_dump(mode="json")
    student = build_network(**network_arguments(dumped), **initial_values(dumped))
    student.backbone.set_grad_checkpointing(config.optim.activation_checkpointing)
    teacher = deepcopy(student).requires_grad_(False).eval()
    student, teacher = student.to(device).train(), teacher.to(device)
    if config.optim.teacher_precision == "fp8":
        use_fp8(teacher.backbone)
    if config.optim.compile:
        for network, num_tokens in zip((teacher, student), tokens_of_slot(config), strict=True):
            compile_blocks(network.backbone, num_tokens)
    optimizer = make_optimizer(student, config.optim.lr, config.optim.weight_decay)
    num_quantities = len(list(student.parameters())) + 2
    return TrainState(
        student=student,
        teacher=teacher,
        center=torch.zeros(config.head.num_outputs, device=device),
        optimizer=optimizer,
        exponents=torch.zeros(num_quantities, dtype=torch.int32),
    )


def measure_names(config: Config, step: int) -> list[str]:
    """Return the names of the measures that each slot of a step computes, in a fixed order."""
    names = ["loss", "teacher_entropy", "teacher_kl_uniform", "teacher_diversity"]
    names += ["local_agreement"] if config.crops.num_locals else []
    if config.tracking.kind == "none":
        return [*names, "global_agreement"]
    tracked = ["object_agreement", "mask_area", "object_overlap", "sinkhorn_residual"]
    return names + (tracked if object_weight(config, step) > 0 else [])


def slot_output(
    state: TrainState,
    clips: NDArray[np.uint8],
    valid: NDArray[np.bool_],
    draws: SlotDraws,
    config: Config,
    forward: SlotForward = slot_forward,
) -> SlotOutput:
    """Render the views of a slot's readable clips and run the forward.

    Args:
        state: the networks and the center.
        clips: (M, T, H, W, 3) uint8.
        valid: (M,) mask of the readable clips.
        draws: the slot's random draws.
        config: the run's.
        forward: `slot_forward`, or an alternative to compare with it.
    """
    inputs = slot_inputs(clips, valid, draws, state.center.device)
    torch.manual_seed(draws.network_seed)
    return _output(state, inputs, draws.object_weight, config, forward)


def _output(
    state: TrainState, inputs: Mapping[str, Tensor], weight: float, config: Config, forward: SlotForward
) -> SlotOutput:
    """Render the views and run the forward in the configured precision; `weight` is that of the objects."""
    kind = state.center.device.type
    with part("augment"):
        globals_, locals_ = render_slot(inputs, config.crops)
    half = kind == "cuda" and config.optim.precision == "bf16"
    with torch.autocast(kind, torch.bfloat16, enabled=half):
        return forward(
            state.student,
            state.teacher,
            state.center,
            method_settings(config),
            globals_=globals_,
            locals_=locals_,
            heads=inputs["heads"],
            noise=inputs.get("noise"),
            object_weight=weight,
        )


def method_settings(config: Config) -> MethodSettings:
    """Return the method's settings for a run."""
    tracking, loss = config.tracking, config.loss
    return MethodSettings(
        kind=tracking.kind,
        views=tracking.views,
        block=tracking.block,
        normalize_patches=tracking.normalize_patches,
        num_iterations=tracking.num_iterations,
        epsilon=tracking.epsilon,
        threshold=tracking.threshold,
        student_temperature=loss.student_temperature,
        teacher_temperature=loss.teacher_temperature,
        reduction=loss.reduction,
        teacher_dtype=None if config.optim.teacher_precision == "same" else torch.bfloat16,
    )


def slot_quantities(
    state: TrainState, batch: SlotBatch, config: Config, forward: SlotForward = slot_forward
) -> list[Tensor]:
    """Compute one slot's quantities: a gradient for each parameter, the teacher's output sum, the measures.

    An unreadable clip has weight 0 and the slot still divides by its full size: the means over readable clips are
    multiplied by the share of readable clips. On a GPU, a CUDA graph computes slots without unreadable clips.
    """
    parameters = list(state.student.parameters())
    names = measure_names(config, batch.step)
    share = float(batch.valid.mean())
    if share == 0.0:
        return [*map(torch.zeros_like, (*parameters, state.center)), state.center.new_zeros(len(names))]
    with part("augment"):
        draws = draw_slot(config, batch.step, batch.slot)

    def compute(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        output = _output(state, inputs, draws.object_weight, config, forward)
        with part("backward"):
            gradients = torch.autograd.grad(output.loss * share, parameters, materialize_grads=True)
        measures = torch.stack([output.measures[name].float() for name in names]) * share
        return [*gradients, output.teacher_sum, measures]

    inputs = slot_inputs(batch.clips, batch.valid, draws, state.center.device)
    torch.manual_seed(draws.network_seed)
    if share < 1.0:
        # Its shapes are its own, and there may be no room for its tensors beside those of the graphs.
        state.graphs.release()
    elif forward is slot_forward and has_graph(config, state.center.device):
        kind = method_settings(config), draws.object_weight
        weights = [*parameters, *state.teacher.parameters(), state.center]
        return state.graphs.run(kind, compute, inputs, weights)
    return compute(inputs)


def has_graph(config: Config, device: torch.device) -> bool:
    """Return whether slots without unreadable clips are computed by a CUDA graph."""
    optim, tracking = config.optim, config.tracking
    # Packed views have other shapes in every slot. Recomputed blocks save the state of the random numbers on the host.
    equal_shapes = tracking.views == "masked" or tracking.kind == "none"
    return device.type == "cuda" and optim.cuda_graph and equal_shapes and not optim.activation_checkpointing


@dataclass(frozen=True)
class StepSums:
    """Sums over all slots of all ranks, the same on every rank.

    Attributes:
        quantities: flat float32 sums: a gradient for each parameter, the teacher's output, the measures.
        largest: (Q,) the largest absolute value of each quantity, on the CPU.
        num_clips: number of readable clips, at most slots x clips per slot.
        records: sums of the callers' integers, (R,) int64.
    """

    quantities: list[Tensor]
    largest: Tensor
    num_clips: int
    records: Tensor


def sum_slots(
    state: TrainState,
    batches: Sequence[SlotBatch],
    records: Tensor,
    config: Config,
    all_reduce: AllReduce | None,
    forward: SlotForward = slot_forward,
) -> StepSums:
    """Run forward and backward for this rank's slots, and sum over all slots of all ranks.

    Args:
        state: only its exponents change, if a quantity outgrew its scale.
        batches: this rank's slots.
        records: integers to sum along with the quantities.
        config: the run's.
        all_reduce: adds a tensor over the ranks, in place; None for a single rank.
        forward: `slot_forward`, or an alternative to compare with it.

    Raises:
        DivergenceError: a quantity is not finite; raised on every rank alike, with its name and the step.
    """
    num_clips = torch.tensor([sum(int(batch.valid.sum()) for batch in batches)])
    while True:
        sums = SlotSums(
            [
                *(p.numel() for p in state.student.parameters()),
                state.center.numel(),
                len(measure_names(config, state.step)),
            ],
            num_records=1 + records.numel(),
            num_slots=config.optim.slots,
            reduction=config.optim.reduction,
            exponents=state.exponents,
            device=state.center.device,
        )
        for batch in batches:
            quantities = slot_quantities(state, batch, config, forward)
            with part("reduction"):
                sums.add(quantities)
        sums.set_records(torch.cat([num_clips, records]))
        with part("reduction"):
            result = sums.all_reduce(all_reduce)
        _require_finite(state, result)
        if not result.overflowed.any():
            return StepSums(result.quantities, result.largest, int(result.records[0]), result.records[1:])
        state.exponents = raised_exponents(state.exponents, result.overflowed)


def _require_finite(state: TrainState, result: SumResult) -> None:
    if not result.not_finite.any():
        return
    names = [f"the gradient of {name}" for name, _ in state.student.named_parameters()]
    names += ["the teacher's output", "a measure (the loss among them)"]
    found = [name for name, count in zip(names, result.not_finite.tolist(), strict=True) if count]
    raise DivergenceError(
        f"step {state.step}: {found[-1]} is not finite"
        + (f", with {len(found) - 1} others" if len(found) > 1 else "")
        + ". All workers stopped; the last checkpoint is untouched. Lower optim.lr, or raise loss.teacher_temperature."
    )


@torch.no_grad()
def apply_step(state: TrainState, sums: StepSums, config: Config) -> tuple[dict[str, Tensor], Rates]:
    """Update student, center and teacher from the sums of one step, and count the step.

    Returns:
        The measures' means over the readable clips (still on the device, not synchronized), and the rates used.
    """
    names = measure_names(config, state.step)
    with part("reduction"):
        state.exponents = next_exponents(sums.largest, state.exponents, first=state.step == 0)
    *gradients, teacher_sum, measures = sums.quantities
    values = rates(state.step, config.optim)
    with part("optimizer"):
        _update_student(state, gradients, values, config)
    with part("ema"):
        _update_center(state, teacher_sum, sums.num_clips, config)
        update_teacher(state.teacher, state.student, values.teacher_momentum)
    state.step += 1
    # Each slot's measures were multiplied by the share of its readable clips.
    means = measures * (config.optim.clips_per_slot / max(1, sums.num_clips))
    return dict(zip(names, means.unbind(), strict=True)), values


def _update_student(state: TrainState, gradients: list[Tensor], values: Rates, config: Config) -> None:
    """Apply one AdamW update from the summed gradients, which are modified in place."""
    optim, parameters = config.optim, list(state.student.parameters())
    torch._foreach_div_(gradients, optim.slots)
    gradients = [g.view_as(p) for g, p in zip(gradients, parameters, strict=True)]
    if optim.gradient_clip is not None:
        clip_each(gradients, optim.gradient_clip)
    set_rates(state.optimizer, values)
    last_layer = set(map(id, state.student.head.last_layer.parameters()))
    frozen = last_layer if state.step < optim.num_frozen_steps else set()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if id(parameter) in frozen else gradient
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)


def _update_center(state: TrainState, teacher_sum: Tensor, num_clips: int, config: Config) -> None:
    """Update the center (equation 7) once a step, from the global views of the readable clips.

    Dividing by the full size would let missing clips pull the center towards 0. Without any clip it stays unchanged.
    """
    if num_clips:
        mean = teacher_sum / (num_clips * config.clip.num_frames * config.num_globals)
        state.center.lerp_(mean, 1.0 - config.loss.center_momentum)
