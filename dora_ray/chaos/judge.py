"""Cost of faults: a run's files compared with those of an undisturbed run.

An attempt is one start of the worker group. A fault accounts for the attempts that begin after it and before the next
fault: for the steps that they repeat, and for the time until the first of their steps.
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
    """Fault that was injected.

    Attributes:
        fault: its name.
        step: steps done at that time.
        time: as time.time().
    """

    fault: str
    step: int
    time: float


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group.

    Attributes:
        time: time of the start; first_step_time: end of the first step, None if there was none.
        begin: step at which it begins.
        world_size: number of workers.
        taken_back: earlier steps that it repeats.
        work_lost: seconds that those had taken.
        silent_since: end of the last step before it.
        noticed: when the run recorded the preceding interruption; None if it did not.
        parts: seconds from then to the first step by activity, as recorded by the run.
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
    """Cost of one fault.

    Attributes:
        recovered_seconds: time without a step, from the fault (or, if training continued, from the last step before the
            restart) to the next step; None if no step followed.
        steps_lost: steps that were repeated.
        work_lost_seconds: time that those had taken.
        clips_lost, clips_repeated: clips of the undisturbed run that the committed history lacks, or has too often.
        parts: the time without a step by activity, as far as the run recorded it.
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
    """Return the attempts of a run, from its lines of metrics.jsonl (one a step) and events.jsonl."""
    starts = {line["attempt"]: line for line in events if line["event"] == "start"}
    recovered = {line["attempt"]: line for line in events if line["event"] == "recovered"}
    found: list[Attempt] = []
    # Latest metrics line of each step that is still done after the attempts so far.
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
    """Return a row for each fault, in the order of injection."""
    return [
        _row(hit, after, tries, _clips(history, reference, steps, clips_per_slot))
        for hit, after, steps in zip(hits, _attempts_of_faults(hits, tries), _spans(hits, tries), strict=True)
    ]


def _attempts_of_faults(hits: Sequence[Hit], tries: Sequence[Attempt]) -> list[list[Attempt]]:
    """Return the attempts that each fault accounts for."""
    ends = [*(hit.time for hit in hits), math.inf][1:]
    return [
        [attempt for attempt in tries if hit.time < attempt.time <= end] for hit, end in zip(hits, ends, strict=True)
    ]


def _spans(hits: Sequence[Hit], tries: Sequence[Attempt]) -> list[range]:
    """Return the steps that each fault accounts for: from its first restart (the first: step 0) to the next one's."""
    answers = zip(hits, _attempts_of_faults(hits, tries), strict=True)
    begins = [min((attempt.begin for attempt in after), default=hit.step) for hit, after in answers]
    bounds = [0, *begins[1:], sys.maxsize] if hits else []
    return [range(first, last) for first, last in pairwise(bounds)]


def _clips(history: History, reference: History, steps: range, clips_per_slot: int) -> tuple[int, int]:
    """Return the numbers of clips lost and repeated among these steps."""
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
    """Return the time until detection, followed by the run's own breakdown."""
    for attempt in after:
        if attempt.noticed is not None:
            return {"detection": round(max(0.0, attempt.noticed - silent_since), 2), **attempt.parts}
    return {}


def weights_difference(checkpoint: str, reference: str) -> float:
    """Return the largest |difference| between two checkpoints: networks, optimizer, center, exponents, step.

    Infinite if they do not hold the same tensors, or if only one of two numbers is finite.
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
    """Return all numbers of a nested state, keyed by their path."""
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
