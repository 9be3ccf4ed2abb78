"""Part c: profile of a step: kernels, gaps between them, and host synchronizations."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dora_ray.bench.gpu.figures import Figures
from dora_ray.bench.gpu.part_step import PLAIN, REHEARSAL
from dora_ray.bench.gpu.trace import summarize
from dora_ray.bench.products import synchronize
from dora_ray.bench.timed import Timed
from dora_ray.config import Config, load_config
from dora_ray.method.dora import slot_forward
from dora_ray.training.graph import WARM_UP_CALLS
from dora_ray.training.numerics import prepare_torch

MOST_BYTES = 8 * 2**20
# The last call before the traced ones records the graph.
WARMUP, STEPS = WARM_UP_CALLS + 1, 2


def run(figures: Figures, *, folder: Path, rehearse: bool) -> None:
    """Trace the plain form, its graph and the packed one; keep the trace of the first if it is small enough."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paper = load_config("paper", *(REHEARSAL if rehearse else ()), *PLAIN)
    prepare_torch(device, paper.optim, deterministic=paper.run.deterministic)
    kept = folder / "trace.json.gz"
    figures.attempt("exact", lambda: _traced(paper, device, folder, keep=kept))
    graph = load_config(paper, "optim.cuda_graph=true")
    figures.attempt("graph", lambda: _traced(graph, device, folder, keep=None))
    packed = load_config(paper, "tracking.views=packed")
    figures.attempt("packed", lambda: _traced(packed, device, folder, keep=None))


def _traced(config: Config, device: torch.device, folder: Path, *, keep: Path | None) -> dict[str, Any]:
    timed = Timed(config, device)
    packed = config.tracking.views == "packed"
    forward = functools.partial(slot_forward, masks=timed.masks()) if packed else slot_forward
    for _ in range(WARMUP):
        timed.step(config, forward)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            timed.step(config, forward)
        synchronize(device)
    path = folder / "trace.json"
    try:
        profiler.export_chrome_trace(str(path))
        content = path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
    found = summarize(json.loads(content)["traceEvents"], steps=STEPS)
    if keep is None:
        return found
    packed_bytes = gzip.compress(content, 6)
    if len(packed_bytes) <= MOST_BYTES:
        keep.write_bytes(packed_bytes)
        return found | {"trace": keep.name, "trace_bytes": len(packed_bytes)}
    return found | {"trace": f"left out: {len(packed_bytes)} bytes, more than {MOST_BYTES}"}
