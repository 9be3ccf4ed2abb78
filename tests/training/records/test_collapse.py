"""What is said of a training that learns nothing: one diagnosis, one remedy, once."""

from __future__ import annotations

import math

import pytest

from dora_ray.training.records.collapse import CollapseWatch

ALIVE = {"teacher_entropy": 2.0, "teacher_diversity": 1.0, "object_overlap": 0.4}
OVERLAP = ALIVE | {"object_overlap": 0.97}


def watch(temperature: float = 0.04, **changes: int) -> CollapseWatch:
    facts = {"num_outputs": 256, "num_images": 32, "num_objects": 3, "num_steps": 400, "warmup_steps": 80} | changes
    return CollapseWatch(teacher_temperature=temperature, lr=2e-3, **facts)


def said(found: CollapseWatch, values: dict[str, float], steps: range) -> list[tuple[int, str]]:
    """What is said at which step."""
    sentences = ((step, found.look(step, values)) for step in steps)
    return [(step, sentence) for step, sentence in sentences if sentence is not None]


def test_nothing_is_said_of_a_training_that_is_alive() -> None:
    assert said(watch(), ALIVE, range(10, 410, 10)) == []


@pytest.mark.parametrize(
    ("entropy", "diversity", "temperature", "share", "remedy"),
    [
        (1.0, 0.0, 0.04, "100%", "Lower optim.lr (now 0.002)"),
        (0.991, 0.0, 0.1, "99%", "Lower loss.teacher_temperature (now 0.1) to 0.07 or less"),
        (0.98, 0.03, 0.1, "98%", "Lower optim.lr (now 0.002)"),
        (0.1, 0.001, 0.04, "10%", "Lower optim.lr (now 0.002)"),
    ],
)
def test_a_collapse_has_one_diagnosis_and_one_remedy(
    entropy: float, diversity: float, temperature: float, share: str, remedy: str
) -> None:
    """A flat output is the same for every image: that is one collapse, not two with opposite remedies."""
    flat = {"teacher_entropy": entropy * math.log(256), "teacher_diversity": diversity, "object_overlap": 0.99}
    ((step, sentence),) = said(watch(temperature), flat, range(10, 410, 10))
    assert step == 90
    assert sentence == (
        f"The teacher gives every image the same output, whose entropy is {share} of that of a flat one. "
        f"{remedy} and start again."
    )


def test_a_collapse_that_returns_is_said_again() -> None:
    found = watch()
    same = ALIVE | {"teacher_diversity": 0.001}
    assert [step for values in (same, ALIVE, same) for step, _ in said(found, values, range(100, 130, 10))] == [
        100,
        100,
    ]


def test_objects_that_overlap_are_named_when_it_lasts() -> None:
    ((step, sentence),) = said(watch(), OVERLAP, range(10, 410, 10))
    assert step == 170, "80 steps of warm-up, seen at 90, lasting for 80 more"
    assert sentence.startswith("The 3 objects overlap by 97%, so they add little")
    assert "since step 90" in sentence
    assert sentence.endswith("lower tracking.num_objects.")
    ((late, _),) = said(watch(warmup_steps=0), OVERLAP, range(10, 410, 10))
    assert late == 50


def test_objects_that_part_in_between_are_not_named() -> None:
    found = watch()
    for first in range(90, 400, 80):
        assert said(found, OVERLAP, range(first, first + 70, 10)) == []
        assert said(found, ALIVE, range(first + 70, first + 80, 10)) == []


def test_steps_without_objects_do_not_end_an_overlap() -> None:
    found = watch()
    without = {name: value for name, value in ALIVE.items() if name != "object_overlap"}
    for step in range(90, 170, 20):
        assert found.look(step, OVERLAP) is None
        assert found.look(step + 10, without) is None
    assert found.look(170, OVERLAP) is not None
    assert [found.look(step, values) for step, values in ((180, without), (190, OVERLAP))] == [None, None]
