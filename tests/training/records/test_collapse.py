"""What is said of a training that learns nothing: one diagnosis, one remedy, once."""

from __future__ import annotations

import math

import pytest

from dora_ray.training.records.collapse import CollapseWatch

ALIVE = {"teacher_entropy": 2.0, "teacher_diversity": 1.0, "object_overlap": 0.4}
OVERLAP = ALIVE | {"object_overlap": 0.97}


def watch(**changes: int) -> CollapseWatch:
    facts = {"num_outputs": 256, "num_images": 32, "num_objects": 3, "num_steps": 400, "warmup_steps": 80} | changes
    return CollapseWatch(teacher_temperature=0.04, **facts)


def said(found: CollapseWatch, values: dict[str, float], steps: range) -> list[tuple[int, str]]:
    """What is said at which step."""
    sentences = ((step, found.look(step, values)) for step in steps)
    return [(step, sentence) for step, sentence in sentences if sentence is not None]


def test_nothing_is_said_of_a_training_that_is_alive() -> None:
    assert said(watch(), ALIVE, range(10, 410, 10)) == []


@pytest.mark.parametrize("share", [0.991, 1.0])
def test_a_flat_output_has_one_remedy(share: float) -> None:
    """A flat output is the same for every image: that is one collapse, not two with opposite remedies."""
    flat = {"teacher_entropy": share * math.log(256), "teacher_diversity": 0.0, "object_overlap": 0.99}
    ((step, sentence),) = said(watch(), flat, range(10, 410, 10))
    assert step == 90
    assert "uniform over its 256 outputs" in sentence
    assert "Lower loss.teacher_temperature (now 0.04)" in sentence
    assert "raise" not in sentence.lower()


def test_one_output_for_all_images_has_one_remedy() -> None:
    same = {"teacher_entropy": 0.5, "teacher_diversity": 0.001, "object_overlap": 0.99}
    ((step, sentence),) = said(watch(), same, range(10, 410, 10))
    assert step == 90
    assert "every image the same few outputs" in sentence
    assert "teacher_temperature" not in sentence


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
