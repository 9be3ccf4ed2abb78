"""The headline promise, in numbers: whatever worlds a run went through, it saw the same clips and has the same bits."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import dora_ray
from dora_ray.clips.plan import slots_of_rank
from dora_ray.clips.slot import SlotBatch, read_slot
from dora_ray.config import Config
from dora_ray.method.dora import track_objects
from dora_ray.method.vit import tracked_features
from dora_ray.training.inputs import Inputs
from dora_ray.training.records.checkpoint import load_newest, take_snapshot, write_snapshot
from dora_ray.training.step import TrainState, apply_step, initial_state, sum_slots
from tests.clips.plans import key_of, stored_inputs
from tests.conftest import SMALL
from tests.training.ranks import run_ranks

STEPS = 60
# (world size, steps of it): a run that shrinks and grows, each time from a checkpoint.
PATH = [(4, 13), (2, 20), (3, 9), (4, 18)]


@pytest.fixture(scope="module")
def inputs(store: Path, ray_cluster) -> Inputs:
    return stored_inputs(store)


def config(*overrides: str) -> Config:
    small = ("optim.steps=60", "optim.warmup_steps=20", "optim.freeze_last_layer_steps=5", "model.drop_path=0.1")
    return dora_ray.load_config("tiny", *SMALL, *small, *overrides)


def train(
    inputs: Inputs, config: Config, path: list[tuple[int, int]], folder: Path
) -> tuple[TrainState, list[list[int]]]:
    """The last state, and for every step the digests of its slots as the ranks' sum brought them together."""
    plan, threads = inputs.plan, torch.get_num_threads()
    torch.set_num_threads(1)
    ledger: list[list[int]] = []
    cache: dict[tuple[int, int], SlotBatch] = {}

    def rank_steps(rank: int, all_reduce, world_size: int, first: int, count: int) -> TrainState:
        state = initial_state(config, torch.device("cpu"))
        load_newest(str(folder), state, config, plan)
        assert state.step == first
        for step in range(first, first + count):
            slots = slots_of_rank(rank, world_size, config.optim.slots, step=step, begin=first)
            batches = [cache[step, slot] for slot in slots]
            records = torch.zeros(config.optim.slots, dtype=torch.int64)
            for batch in batches:
                records[batch.slot] = batch.digest
            result = sum_slots(state, batches, records, config, all_reduce if world_size > 1 else None)
            if rank == 0:
                ledger.append(result.records.tolist())
            apply_step(state, result, config)
        return state

    first = 0
    for world_size, count in path:
        steps = range(first, first + count)
        keys = itertools.product(steps, range(config.optim.slots))
        cache |= {key: read_slot(inputs.contents, key_of(inputs.contents, *key)) for key in keys}
        # One rank after the other in every step: threads of one process share torch's generator.
        states = run_ranks(
            world_size, lambda rank, add, w=world_size, f=first, c=count: rank_steps(rank, add, w, f, c), in_turn=True
        )
        write_snapshot(take_snapshot(states[0], config, plan, world_size), str(folder))
        first += count
    torch.set_num_threads(threads)
    return states[0], ledger


def numbers(state: TrainState) -> dict[str, torch.Tensor]:
    """Everything that the next step depends on."""
    moments = {
        f"optimizer.{index}.{name}": value
        for index, values in state.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    networks = {f"student.{k}": v for k, v in state.student.state_dict().items()}
    networks |= {f"teacher.{k}": v for k, v in state.teacher.state_dict().items()}
    return networks | moments | {"center": state.center, "exponents": state.exponents}


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, tmp_path_factory) -> tuple[TrainState, list[list[int]]]:
    return train(inputs, config(), [(1, STEPS)], tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
def test_a_path_through_several_worlds_is_the_same_training(undisturbed, inputs: Inputs, tmp_path: Path) -> None:
    state, ledger = train(inputs, config(), PATH, tmp_path)
    expected, expected_ledger = undisturbed
    assert ledger == expected_ledger
    assert len(ledger) == STEPS
    ours, theirs = numbers(state), numbers(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name


@pytest.mark.long  # shows why sums are exact; it guards no code
def test_float32_sums_drift(undisturbed, inputs: Inputs, tmp_path: Path, capsys) -> None:
    """What `exact` is for: the same path with float32 sums ends elsewhere; how far is printed."""
    state, ledger = train(inputs, config("optim.reduction=float32"), PATH, tmp_path / "path")
    alone, _ = train(inputs, config("optim.reduction=float32"), [(1, STEPS)], tmp_path / "alone")
    assert ledger == undisturbed[1]
    pairs = zip(state.student.parameters(), alone.student.parameters(), strict=True)
    largest = max(float((one - other).detach().abs().max()) for one, other in pairs)
    ours, theirs = masks(state, inputs), masks(alone, inputs)
    with capsys.disabled():
        print(  # noqa: T201  a difference that only a person can judge
            f"\nfloat32 sums, worlds 4-2-3-4 against 1, {STEPS} steps: largest difference of a weight {largest:.2e}; "
            f"{int((ours != theirs).sum())} of {ours.numel()} mask bits differ"
        )
    assert 0 < largest < 0.1


def masks(state: TrainState, inputs: Inputs) -> torch.Tensor:
    """(S * M, K, T, N) bool: the objects' masks that the teacher gives the clips of the next step."""
    found = []
    for slot in range(inputs.plan.slots):
        pixels = torch.from_numpy(
            read_slot(inputs.contents, key_of(inputs.contents, STEPS, slot)).clips[:, :, :32, :32].copy()
        )
        frames = pixels.permute(0, 1, 4, 2, 3).float() / 255
        heads = torch.arange(3).expand(len(frames), 3)
        with torch.no_grad():
            tracked = tracked_features(state.teacher.backbone, frames, block=-2)
            rules = {"normalize_patches": True, "num_iterations": 30, "epsilon": 0.05, "threshold": "clip"}
            found.append(track_objects(tracked, heads, **rules).masks > 0)
    return torch.cat(found)
