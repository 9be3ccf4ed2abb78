"""Pictures of a run's objects: when they are due, where they go, and that training is the same bits without them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dora_ray
from dora_ray.clips.slot import SlotBatch
from dora_ray.config import Config, load_config
from dora_ray.reporting.render import read_pictures
from dora_ray.training import loop
from dora_ray.training.drawing import ObjectPictures, picture_steps
from dora_ray.training.records.journal import read_events
from dora_ray.training.step import initial_state
from tests.conftest import SMALL
from tests.training.records.test_journal import read_board
from tests.training.test_train_local import same, weights_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("pictures", "steps", "due"),
    [(0, 400, []), (1, 400, [400]), (3, 400, [1, 200, 400]), (3, 1, [1]), (3, 2, [1, 2]), (9, 4, [1, 2, 3, 4])],
)
def test_pictures_are_due_from_the_first_step_to_the_last(pictures: int, steps: int, due: list[int]) -> None:
    config = load_config("tiny", f"run.pictures={pictures}", f"optim.steps={steps}")
    assert sorted(picture_steps(config)) == due


def batch(config: Config, seed: int, *, valid: tuple[bool, bool] = (True, True)) -> SlotBatch:
    shape = (2, config.clip.num_frames, config.crops.clip_size, config.crops.clip_size, 3)
    clips = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return SlotBatch(0, 0, clips, np.array(valid), 0, True)


def test_drawing_changes_no_state_and_no_random_generator() -> None:
    config = load_config("tiny", *SMALL)
    state = initial_state(config, CPU)
    before = {name: value.clone() for name, value in state.teacher.state_dict().items()}
    modes = [module.training for module in state.teacher.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    picture = ObjectPictures(config).draw(state.teacher.backbone, [batch(config, 0)], 1)
    assert picture is not None
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == generators[1:]
    after = state.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) and not after[name].is_inference() for name in before)
    assert [module.training for module in state.teacher.modules()] == modes


def test_an_attempt_draws_one_clip_again_and_again() -> None:
    config = load_config("tiny", *SMALL)
    teacher = initial_state(config, CPU).teacher.backbone
    pictures = ObjectPictures(config)
    assert pictures.draw(teacher, [batch(config, 0, valid=(False, False))], 1) is None, "nothing to draw yet"
    first, again = (pictures.draw(teacher, [batch(config, seed)], 1) for seed in (1, 2))
    other = ObjectPictures(config).draw(teacher, [batch(config, 2)], 1)
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_a_teacher_that_diverged_is_not_drawn() -> None:
    config = load_config("tiny", *SMALL)
    teacher = initial_state(config, CPU).teacher.backbone
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(torch.nan)
    assert ObjectPictures(config).draw(teacher, [batch(config, 0)], 1) is None


def pictures_of(run: Path) -> dict[int, tuple[int, int]]:
    """Sizes of TensorBoard's pictures of a run by step."""
    sizes = {}
    for event in read_board(str(run)):
        for value in event.summary.value:
            if value.tag == "objects":
                image = Image.open(io.BytesIO(value.image.encoded_image_string))
                assert (image.width, image.height) == (value.image.width, value.image.height)
                sizes[event.step] = image.size
    return sizes


def train(config: Config, out: Path) -> Path:
    return Path(dora_ray.train(config, out=out, progress=False).path)


def test_weights_are_the_same_bits_with_and_without(
    tmp_path: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = train(load_config("tiny", *small), tmp_path / "drawn")
    plain = train(load_config("tiny", *small, "run.pictures=0"), tmp_path / "plain")
    assert same(weights_of(drawn), weights_of(plain))
    steps = set(picture_steps(load_config("tiny", *small)))
    assert len(steps) == 3
    assert pictures_of(drawn).keys() == steps
    assert pictures_of(plain) == {}
    named = [event["name"] for event in read_events(str(drawn)) if event["event"] == "picture"]
    assert named == [f"pictures/step-{step:08d}/objects.png" for step in sorted(steps)]
    files = [Image.open(drawn / name) for name in named]
    assert [file.size for file in files] == [pictures_of(drawn)[step] for step in sorted(steps)]
    assert len({file.tobytes() for file in files}) == 3, "the teacher changes"
    assert [picture.caption for picture in read_pictures(str(drawn / "pictures"))] == [
        f"objects, at step {step}" for step in sorted(steps)
    ]
    assert not (plain / "pictures").exists()

    def too_much(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(loop.ObjectPictures, "draw", too_much)
    poor = train(load_config("tiny", *small), tmp_path / "poor")
    assert same(weights_of(poor), weights_of(plain))
    said = [event["message"] for event in read_events(str(poor)) if event["event"] == "warning"]
    assert said.count("no picture of objects: out of memory") == 3
