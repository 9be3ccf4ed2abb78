"""Analysis of a torch.profiler trace: time by kernel, GPU idle time, and host synchronizations."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TOP = 25
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
# Calls in which the host waits for the GPU, including synchronous cudaMemcpy.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
# Duration of an unobstructed launch in microseconds; in a longer gap, the GPU was idle.
LONG_GAP = 10.0

Event = Mapping[str, Any]


def summarize(events: Iterable[Event], *, steps: int) -> dict[str, Any]:
    """Summarize the events of several steps.

    Args:
        events: "traceEvents" of a Chrome trace; times in microseconds.
        steps: number of traced steps.

    Returns:
        For each step: kernels, wall_ms from the first kernel's start to the last one's end, busy_ms, gap_share (the
        share without a kernel), long_gaps of over 10 us and their time; top, the kernels that take the most time;
        parts_ms, GPU time by named part; waits, host synchronizations by part. On a CPU, which has no kernels,
        operators instead, including nested ones.
    """
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    kernels = [event for event in complete if event.get("cat") in ON_GPU]
    work = kernels or [event for event in complete if event.get("cat") == "cpu_op"]
    return {
        "steps": steps,
        "of": "kernels" if kernels else "operators of a CPU, nested",
        **_busy(work, steps),
        "top": _top(work, steps),
        "parts_ms": _parts(complete, steps, "gpu_user_annotation" if kernels else "user_annotation"),
        "waits": _waits(complete, steps),
    }


def _busy(work: Sequence[Event], steps: int) -> dict[str, Any]:
    if not work:
        return {"kernels": 0}
    spans = sorted((float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in work)
    merged = [list(spans[0])]
    for begin, end in spans[1:]:
        if begin > merged[-1][1]:
            merged.append([begin, end])
        else:
            merged[-1][1] = max(merged[-1][1], end)
    wall = merged[-1][1] - merged[0][0]
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(merged)]
    long = [gap for gap in gaps if gap > LONG_GAP]
    busy = sum(end - begin for begin, end in merged)
    return {
        "kernels": len(work) / steps,
        "wall_ms": wall / 1e3 / steps,
        "busy_ms": busy / 1e3 / steps,
        "gap_share": 1.0 - busy / wall if wall else 0.0,
        "median_kernel_us": statistics.median(end - begin for begin, end in spans),
        "long_gaps": len(long) / steps,
        "long_gaps_ms": sum(long) / 1e3 / steps,
    }


def _top(work: Sequence[Event], steps: int) -> list[dict[str, Any]]:
    seconds: dict[str, float] = defaultdict(float)
    counts = Counter(str(event["name"]) for event in work)
    for event in work:
        seconds[str(event["name"])] += float(event["dur"])
    whole = sum(seconds.values())
    order = sorted(seconds, key=seconds.__getitem__, reverse=True)[:TOP]
    return [
        {
            "name": name[:120],
            "ms": seconds[name] / 1e3 / steps,
            "calls": counts[name] / steps,
            "share": seconds[name] / whole if whole else 0.0,
        }
        for name in order
    ]


def _parts(events: Sequence[Event], steps: int, category: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") == category and not str(event["name"]).startswith("ProfilerStep"):
            found[str(event["name"])] += float(event["dur"]) / 1e3 / steps
    return dict(found)


def _waits(events: Sequence[Event], steps: int) -> list[dict[str, Any]]:
    """Return the host's synchronizations: call, enclosing part, number, and duration."""
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    counts: Counter[tuple[str, str]] = Counter()
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "cuda_runtime" and event["name"] in WAITS:
            key = (str(event["name"]), _innermost(annotations, event))
            counts[key] += 1
            seconds[key] += float(event["dur"])
    return [
        {"call": call, "part": part, "calls": counts[call, part] / steps, "ms": seconds[call, part] / 1e3 / steps}
        for call, part in sorted(counts, key=seconds.__getitem__, reverse=True)
    ]


def _innermost(annotations: Sequence[Event], event: Event) -> str:
    """Return the name of the shortest annotation of the same thread around the event."""
    around = [
        one
        for one in annotations
        if one.get("tid") == event.get("tid") and one["ts"] <= event["ts"] <= one["ts"] + one["dur"]
    ]
    return str(min(around, key=lambda one: float(one["dur"]))["name"]) if around else "between parts"
