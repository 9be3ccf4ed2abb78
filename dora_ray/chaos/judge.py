"""Losses of a run with faults, from its files alone, compared with those of a run that was left alone.

An attempt is one start of the worker group. A fault answers for the attempts that begin after it and before the next
fault: for the steps that they take back, and for the time without a step before the first of their steps.
"""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dora_ray import files
from dora_ray.checkpoints import MODEL, STATE

Line = Mapping[str, Any]
History = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Hit:
    """A fault that struck.

    Attributes:
        fault: its name.
        step: steps done when it struck.
        time: when, as time.time().
    """

    fault: str
    step: int
    time: float


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group.

    Attributes:
        time: of its start; first_step_time: when its first step was done, None when it did none.
        begin: step that it begins at.
        world_size: its workers.
        taken_back: steps done before that it does again.
        work_lost: seconds that those had taken.
        silent_since: when the last step before it was done.
        noticed: when the interruption before it was seen, by the run's own word; None when it said none.
        parts: seconds from then to the first step, by what they were spent on, by the run's own word.
    """

    time: float
    first_step_time: float | None
    begin: int
    world_size: int
    taken_back: int
    work_lost: float
    silent_since: float
    noticed: float | None
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """The cost of one fault.

    Attributes:
        recovered_seconds: without a step, from the fault (or, when training went on, from the last step before the
            restart) to the next step; None when no step followed.
        steps_lost: steps that were computed again.
        work_lost_seconds: time that those had taken.
        clips_lost, clips_repeated: clips of the undisturbed run that the committed history lacks, or has too often.
        parts: the time without a step, by what it was spent on, as far as the run tells.
    """

    fault: str
    step: int
    world_sizes: tuple[int, ...]
    recovered_seconds: float | None
    steps_lost: int
    work_lost_seconds: float
    clips_lost: int
    clips_repeated: int
    parts: Mapping[str, float]


def attempts(metrics: Sequence[Line], events: Sequence[Line]) -> list[Attempt]:
    """The attempts of a run, from its lines of metrics.jsonl (one a step) and events.jsonl."""
    starts = {line["attempt"]: line for line in events if line["event"] == "start"}
    recovered = {line["attempt"]: line for line in events if line["event"] == "recovered"}
    found: list[Attempt] = []
    # The line of each step that is done, as the attempts up to here have it.
    done: dict[int, Line] = {}
    for attempt, start in sorted(starts.items()):
        steps = {line["step"]: line for line in metrics if line.get("attempt") == attempt and "step" in line}
        lost = [line for step, line in done.items() if step > start["step"]]
        said = recovered.get(attempt)
        found.append(
            Attempt(
                time=start["time"],
                first_step_time=min((line["time"] for line in steps.values()), default=None),
                begin=start["step"],
                world_size=start["world_size"],
                taken_back=len(lost),
                work_lost=sum(line["step_seconds"] for line in lost),
                silent_since=max((line["time"] for line in done.values()), default=start["time"]),
                noticed=said["time"] - said["seconds"] if said else None,
                parts=said["parts"] if said else {},
            )
        )
        done = {step: line for step, line in done.items() if step <= start["step"]} | steps
    return found


def judge(
    hits: Sequence[Hit],
    tries: Sequence[Attempt],
    *,
    history: History,
    reference: History,
    clips_per_slot: int,
) -> list[Row]:
    """A row for each fault, in the order they struck."""
    return [
        _row(hit, after, tries, _clips(history, reference, steps, clips_per_slot))
        for hit, after, steps in zip(hits, _answers(hits, tries), _spans(hits, tries), strict=True)
    ]


def _answers(hits: Sequence[Hit], tries: Sequence[Attempt]) -> list[list[Attempt]]:
    """The attempts that each fault answers for."""
    ends = [*(hit.time for hit in hits), math.inf][1:]
    return [
        [attempt for attempt in tries if hit.time < attempt.time <= end] for hit, end in zip(hits, ends, strict=True)
    ]


def _spans(hits: Sequence[Hit], tries: Sequence[Attempt]) -> list[range]:
    """The steps that each fault answers for: from its first restart to the next fault's; the first one, from step 0."""
    answers = zip(hits, _answers(hits, tries), strict=True)
    begins = [min((attempt.begin for attempt in after), default=hit.step) for hit, after in answers]
    bounds = [0, *begins[1:], sys.maxsize] if hits else []
    return [range(first, last) for first, last in pairwise(bounds)]


def _clips(history: History, reference: History, steps: range, clips_per_slot: int) -> tuple[int, int]:
    """Clips lost and repeated among these steps."""
    ours = Counter((step, slot) for step, slots in history.items() if step in steps for slot in slots)
    theirs = Counter((step, slot) for step, slots in reference.items() if step in steps for slot in slots)
    return (theirs - ours).total() * clips_per_slot, (ours - theirs).total() * clips_per_slot


def _row(hit: Hit, after: Sequence[Attempt], tries: Sequence[Attempt], clips: tuple[int, int]) -> Row:
    before = [attempt.world_size for attempt in tries if attempt.time <= hit.time][-1:]
    steps = [attempt.first_step_time for attempt in after if attempt.first_step_time is not None]
    silent_since = max([hit.time, *(attempt.silent_since for attempt in after[:1])])
    return Row(
        fault=hit.fault,
        step=hit.step,
        world_sizes=(*before, *(attempt.world_size for attempt in after)),
        recovered_seconds=min(steps) - silent_since if steps else None,
        steps_lost=sum(attempt.taken_back for attempt in after),
        work_lost_seconds=sum(attempt.work_lost for attempt in after),
        clips_lost=clips[0],
        clips_repeated=clips[1],
        parts=_parts(silent_since, after),
    )


def _parts(silent_since: float, after: Sequence[Attempt]) -> dict[str, float]:
    """From the silence to its being noticed, and on by the run's own word."""
    for attempt in after:
        if attempt.noticed is not None:
            return {"detection": round(max(0.0, attempt.noticed - silent_since), 2), **attempt.parts}
    return {}


def weights_difference(checkpoint: str, reference: str) -> float:
    """Largest |difference| between the numbers of two checkpoints: networks, optimizer, center, exponents, step.

    Infinite when they do not hold the same tensors, or when only one of two numbers is finite.
    """
    ours, theirs = _tensors(checkpoint), _tensors(reference)
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return math.inf
    return max(_difference(ours[name], theirs[name]) for name in ours)


def _difference(one: Tensor, other: Tensor) -> float:
    if torch.equal(one, other):
        return 0.0
    difference = float((one.double() - other.double()).abs().max())
    return difference if math.isfinite(difference) else math.inf


def _tensors(checkpoint: str) -> dict[str, Tensor]:
    state = torch.load(io.BytesIO(files.read_bytes(files.join(checkpoint, STATE))), weights_only=True)
    return safetensors.torch.load(files.read_bytes(files.join(checkpoint, MODEL))) | _flatten("state", state)


def _flatten(name: str, value: Any) -> dict[str, Tensor]:
    """All numbers of a nested state, by the path to them."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        parts = [(f"{name}.{key}", inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{name}.{index}", inner) for index, inner in enumerate(value)]
    elif isinstance(value, int | float):
        return {name: torch.tensor(value, dtype=torch.float64)}
    else:
        return {}
    return {path: tensor for part, inner in parts for path, tensor in _flatten(part, inner).items()}
