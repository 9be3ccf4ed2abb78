"""A step: the sum of its slots, whoever computes them; unreadable clips weigh nothing; what diverges is named."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dora_ray.clips.plan import slots_of_rank
from dora_ray.clips.slot import SlotBatch
from dora_ray.config import Config, OptimConfig, load_config
from dora_ray.errors import ClusterError, DivergenceError
from dora_ray.training.draws import draw_slot
from dora_ray.training.numerics import prepare_torch, require_fp8
from dora_ray.training.step import (
    TrainState,
    apply_step,
    initial_state,
    measure_names,
    slot_output,
    slot_quantities,
    sum_slots,
)
from tests.conftest import SMALL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_config(*overrides: str) -> Config:
    return load_config("tiny", *SMALL, *overrides)


def batch(config: Config, step: int, slot: int, valid: list[bool] | None = None) -> SlotBatch:
    size, count = config.crops.clip_size, config.optim.clips_per_slot
    rng = np.random.default_rng([step, slot])
    clips = rng.integers(0, 256, (count, config.clip.num_frames, size, size, 3), dtype=np.uint8)
    return SlotBatch(step, slot, clips, np.array(valid or [True] * count), digest=slot, final=True)


class Others:
    """The other ranks, as the first one sees them in an all-reduce."""

    def __init__(self) -> None:
        self._sent: list[torch.Tensor] = []

    def send(self, flat: torch.Tensor) -> None:
        self._sent.append(flat.clone())

    def receive(self, flat: torch.Tensor) -> None:
        for other in self._sent:
            flat += other


def train(
    config: Config, world_size: int, steps: int = 4, *, unreadable: frozenset[tuple[int, int, int]] = frozenset()
) -> TrainState:
    """The state after some steps of `world_size` ranks; they hold equal states and compute one after the other.

    Clips (step, slot, position) in `unreadable` are missing.
    """
    state = initial_state(config, CPU)
    records = torch.zeros(1, dtype=torch.int64)

    def read(step: int, slot: int) -> SlotBatch:
        return batch(
            config, step, slot, [(step, slot, i) not in unreadable for i in range(config.optim.clips_per_slot)]
        )

    for step in range(steps):
        shares = [
            [read(step, slot) for slot in slots_of_rank(rank, world_size, config.optim.slots, step=step, begin=0)]
            for rank in range(world_size)
        ]
        others = Others()
        for share in shares[1:]:
            sum_slots(state, share, records, config, others.send)
        apply_step(state, sum_slots(state, shares[0], records, config, others.receive), config)
    return state


@pytest.mark.parametrize("kind", ["dora", "random", "none"])
def test_weights_are_bit_identical_for_every_world_size(kind: str) -> None:
    views = "packed" if kind == "random" else "masked"
    config = small_config(f"tracking.kind={kind}", "model.drop_path=0.2", f"tracking.views={views}")
    alone = train(config, 1)
    for world_size in (2, 3, 4):
        shared = train(config, world_size)
        for name, tensor in alone.student.state_dict().items():
            assert torch.equal(tensor, shared.student.state_dict()[name]), name
        assert torch.equal(alone.center, shared.center)
        assert torch.equal(alone.exponents, shared.exponents)


def test_the_recipe_released_begins_and_crops_as_the_released_code() -> None:
    config = load_config("released", *SMALL, "tracking.num_objects=2", "model.num_heads=6", "model.drop_path=0")
    student = initial_state(config, CPU).student
    assert student.backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert student.head.last_layer.direction.abs().max() <= config.head.bottleneck_width**-0.5
    assert student.backbone.position_interpolation == "released"
    one = batch(config, 0, 0)
    for override in ("model.position_interpolation=antialiased", "crops.local_interpolation=bilinear"):
        other = load_config(config, override)
        losses = [
            slot_output(initial_state(each, CPU), one.clips, one.valid, draw_slot(each, 0, 0), each).loss.item()
            for each in (config, other)
        ]
        assert losses[0] != losses[1], override


def test_loss_is_the_mean_over_the_clips() -> None:
    """The loss of a slot is the mean of its clips' losses, each with its own draws."""
    config = small_config("model.drop_path=0")
    state = initial_state(config, CPU)
    whole, draws = batch(config, 0, 0), draw_slot(config, 0, 0)
    together = slot_output(state, whole.clips, whole.valid, draws, config).loss
    alone = [
        slot_output(state, whole.clips, np.arange(len(whole.valid)) == i, draws, config).loss
        for i in range(len(whole.valid))
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_unreadable_clips_weigh_nothing_over_the_nominal_size() -> None:
    config = small_config("model.drop_path=0")
    state = initial_state(config, CPU)
    full, half = batch(config, 0, 1), batch(config, 0, 1, [True, False])
    garbage = deepcopy(half)
    garbage.clips[1] = 255
    for one, other in zip(slot_quantities(state, half, config), slot_quantities(state, garbage, config), strict=True):
        assert torch.equal(one, other)
    readable = slot_output(state, full.clips, half.valid, draw_slot(config, 0, 1), config)
    loss = slot_quantities(state, half, config)[-1][0]
    torch.testing.assert_close(loss, readable.loss.detach().float() / 2)
    nothing = slot_quantities(state, batch(config, 0, 1, [False, False]), config)
    assert all(not quantity.any() for quantity in nothing)


def test_last_layer_is_frozen_first_and_clipped_gradients_move_the_rest() -> None:
    config = small_config("optim.freeze_last_layer_steps=1")
    state = initial_state(config, CPU)
    for step, moves in enumerate([False, True]):
        before = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
        batches = [batch(config, step, slot) for slot in range(config.optim.slots)]
        state.optimizer.param_groups[0]["lr"] = 1.0
        apply_step(state, sum_slots(state, batches, torch.zeros(0, dtype=torch.int64), config, None), config)
        moved = {name for name, tensor in state.student.state_dict().items() if not torch.equal(tensor, before[name])}
        assert ("head.last_layer.direction" in moved) == moves
        assert state.step == step + 1


def test_center_is_a_moving_average_over_the_batch() -> None:
    config = small_config()
    state = initial_state(config, CPU)
    batches = [batch(config, 0, slot) for slot in range(config.optim.slots)]
    outputs = [slot_output(state, b.clips, b.valid, draw_slot(config, 0, b.slot), config).teacher_sum for b in batches]
    views = config.optim.slots * config.optim.clips_per_slot * config.clip.num_frames
    expected = 0.1 * torch.stack(outputs).sum(0) / views
    apply_step(state, sum_slots(state, batches, torch.zeros(0, dtype=torch.int64), config, None), config)
    torch.testing.assert_close(state.center, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", ["exact", "float32"])
def test_the_center_is_that_of_the_clips_that_were_read(reduction: str) -> None:
    """An unreadable clip has no output: it must not pull the center towards 0, nor make measures look smaller."""
    config = small_config(f"optim.reduction={reduction}", "model.drop_path=0")
    state = initial_state(config, CPU)
    valid = [[True, True], [True, False], [False, False], [False, True]]
    batches = [batch(config, 0, slot, valid[slot]) for slot in range(config.optim.slots)]
    outputs = [
        slot_output(state, b.clips, b.valid, draw_slot(config, 0, b.slot), config) for b in batches if b.valid.any()
    ]
    mean = torch.stack([output.teacher_sum for output in outputs]).double().sum(0) / (4 * config.clip.num_frames)
    loss = sum(share * output.loss.item() for share, output in zip([2, 1, 1], outputs, strict=True)) / 4
    sums = sum_slots(state, batches, torch.zeros(0, dtype=torch.int64), config, None)
    measures, _ = apply_step(state, sums, config)
    assert sums.num_clips == 4
    torch.testing.assert_close(state.center, (0.1 * mean).float(), rtol=1e-5, atol=1e-8)
    assert float(measures["loss"]) == pytest.approx(loss, rel=1e-5)


def test_weights_are_bit_identical_for_every_world_size_with_unreadable_clips() -> None:
    config = small_config("model.drop_path=0.2")
    unreadable = frozenset({(0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 3, 1), (2, 2, 0)})
    alone, complete = train(config, 1, unreadable=unreadable), train(config, 1)
    assert not torch.equal(alone.center, complete.center)
    for world_size in (2, 3):
        shared = train(config, world_size, unreadable=unreadable)
        assert torch.equal(alone.center, shared.center)
        for name, tensor in alone.student.state_dict().items():
            assert torch.equal(tensor, shared.student.state_dict()[name]), name


def test_a_step_without_any_clip_leaves_the_center() -> None:
    config = small_config()
    state = train(config, 1, steps=1)
    before = state.center.clone()
    batches = [batch(config, 1, slot, [False, False]) for slot in range(config.optim.slots)]
    apply_step(state, sum_slots(state, batches, torch.zeros(0, dtype=torch.int64), config, None), config)
    assert before.any()
    assert torch.equal(state.center, before)


def test_not_finite_names_measure_and_step() -> None:
    config = small_config()
    state = initial_state(config, CPU)
    with torch.no_grad():
        state.student.head.mlp[0].bias.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"step 0: .*loss.* is not finite"):
        sum_slots(state, [batch(config, 0, 0)], torch.zeros(0, dtype=torch.int64), config, None)


@pytest.mark.parametrize("heads_per", ["clip", "slot"])
def test_heads_are_distinct_and_drawn_per_clip_or_slot(heads_per: str) -> None:
    config = small_config(f"tracking.heads_per={heads_per}", "optim.clips_per_slot=16")
    heads = draw_slot(config, 5, 1).heads
    assert heads.shape == (16, 3)
    assert all(len(set(row)) == 3 and set(row) <= set(range(6)) for row in heads.tolist())
    assert (len({tuple(row) for row in heads.tolist()}) == 1) == (heads_per == "slot")


@pytest.mark.parametrize("kind", ["dora", "random", "none"])
@pytest.mark.parametrize("num_locals", [0, 2])
def test_measures_are_those_of_the_method(kind: str, num_locals: int) -> None:
    config = small_config(f"tracking.kind={kind}", f"crops.num_locals={num_locals}")
    state = initial_state(config, CPU)
    one = batch(config, 0, 0)
    output = slot_output(state, one.clips, one.valid, draw_slot(config, 0, 0), config)
    assert set(output.measures) == set(measure_names(config, 0))


def test_objects_every_nth_step_weigh_as_much_in_the_mean() -> None:
    config = small_config("tracking.every_steps=3", "model.drop_path=0")
    always = small_config("model.drop_path=0")
    state = initial_state(config, CPU)
    one = batch(config, 0, 0)
    output = slot_output(state, one.clips, one.valid, draw_slot(config, 0, 0), config)
    exact = slot_output(state, one.clips, one.valid, draw_slot(always, 0, 0), always)
    off = slot_output(state, one.clips, one.valid, replace(draw_slot(config, 0, 0), object_weight=0.0), config)
    torch.testing.assert_close((output.loss + 2 * off.loss) / 3, exact.loss)
    assert [draw_slot(config, step, 0).object_weight for step in range(6)] == [3, 0, 0, 3, 0, 0]
    for step, measured in enumerate([output, off]):
        assert set(measured.measures) == set(measure_names(config, step))


def test_steps_without_objects_are_applied_too() -> None:
    config = small_config("tracking.every_steps=2", "tracking.views=packed")
    state = initial_state(config, CPU)
    records = torch.zeros(0, dtype=torch.int64)
    found = []
    for step in range(2):
        batches = [batch(config, step, slot) for slot in range(config.optim.slots)]
        measures, _ = apply_step(state, sum_slots(state, batches, records, config, None), config)
        found.append("mask_area" in measures)
    assert found == [True, False]


def test_activation_checkpointing_trains_the_same_weights() -> None:
    plain = train(small_config("model.drop_path=0.2"), 1)
    saving = train(small_config("model.drop_path=0.2", "optim.activation_checkpointing=true"), 1)
    for name, tensor in plain.student.state_dict().items():
        assert torch.equal(tensor, saving.student.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_products_in_float32_round_to_tf32_only_beside_bf16(precision, monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, precision != "bf16"
    prepare_torch(torch.device("cuda"), OptimConfig(precision=precision), deterministic=False)
    after, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, before
    assert after == (precision == "bf16")


def test_a_teacher_in_fp8_gives_the_same_training_for_any_number_of_workers() -> None:
    config = small_config("optim.teacher_precision=fp8", "model.width=48", "model.num_heads=3")
    exact = small_config("model.width=48", "model.num_heads=3")
    one, two, plain = train(config, 1), train(config, 2), train(exact, 1)
    for ours, theirs in zip(one.student.parameters(), two.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(one.center, plain.center), "fp8 was not used"
    torch.testing.assert_close(one.center, plain.center, rtol=0.3, atol=0.05)


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ClusterError, match=r"fp8 needs .* 8\.9 .*A100 has 8\.0: use bf16"):
        require_fp8(torch.device("cuda"))
    require_fp8(CPU)
