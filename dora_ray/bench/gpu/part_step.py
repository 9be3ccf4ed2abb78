"""Part b: the step in all forms, the recipe `paper` first, with each form's share of the GPU's rate."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from dora_ray.bench.gpu.figures import Figures
from dora_ray.bench.noise import noise
from dora_ray.bench.products import Products, record, square_flops_per_second
from dora_ray.bench.timed import ALONE, Timed
from dora_ray.bench.yardstick import Yardstick
from dora_ray.config import Config, load_config
from dora_ray.method.dora import slot_forward
from dora_ray.method.reference import reference_slot_forward
from dora_ray.training.graph import WARM_UP_CALLS
from dora_ray.training.numerics import has_fp8, prepare_torch
from dora_ray.training.step import SlotForward, has_graph

# A form is timed until one of these is reached, but at least three times.
MOST_STEPS, MOST_SECONDS = 10, 4.0
REHEARSAL = (
    "model.name=vit_tiny_patch16_224",
    "model.width=96",
    "model.depth=2",
    "clip.num_frames=2",
    "crops.clip_size=80",
    "crops.global_size=64",
    "crops.local_size=32",
    "head.num_outputs=512",
    "optim.clips_per_slot=2",
)
# Launched kernel by kernel, so that parts and products can be told apart.
PLAIN = (*ALONE, "optim.cuda_graph=false")
LARGER = {"vit_base": "paper-vit-b", "vit_large": "paper-vit-l"}


def run(figures: Figures, *, rehearse: bool) -> None:
    """Measure every form; report one that fails, and continue with the next."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paper = load_config("paper", *(REHEARSAL if rehearse else ()), *PLAIN)
    prepare_torch(device, paper.optim, deterministic=paper.run.deterministic)
    figures.put("setting", _setting(paper, device))
    figures.attempt("exact", functools.partial(_exact, figures, paper, device))
    figures.attempt("reference", lambda: _form(paper, device, reference_slot_forward))
    graph, packed = load_config(paper, "optim.cuda_graph=true"), load_config(paper, "tracking.views=packed")
    figures.attempt("graph", lambda: _form(graph, device, slot_forward))
    figures.attempt("packed", lambda: _form(packed, device, None))
    second = load_config(graph, "tracking.every_steps=2")
    figures.attempt("every_second", lambda: _form(second, device, slot_forward, number=1))
    if has_fp8(device) or device.type == "cpu":
        figures.attempt("fp8_teacher", functools.partial(_fp8, paper, device))
    figures.attempt("compiled", lambda: _form(load_config(paper, "optim.compile=true"), device, slot_forward))
    fastest = load_config(graph, "optim.compile=true")
    figures.attempt("graph_compiled", lambda: _form(fastest, device, slot_forward))
    both = load_config(packed, "optim.compile=true")
    figures.attempt("packed_compiled", lambda: _form(both, device, None))
    for name, recipe in LARGER.items():
        larger = load_config(recipe, *(REHEARSAL[1:] if rehearse else ()), *PLAIN)
        figures.attempt(name, functools.partial(_larger, larger, device))
        if has_graph(with_graph := load_config(larger, "optim.cuda_graph=true"), device):
            figures.attempt(f"{name}_graph", functools.partial(_form, with_graph, device, slot_forward))
    torch.use_deterministic_algorithms(False)
    figures.attempt("not_deterministic", lambda: _form(graph, device, slot_forward))


def _setting(config: Config, device: torch.device) -> dict[str, Any]:
    return {
        "device": device.type,
        "network": config.model.name,
        "num_outputs": config.head.num_outputs,
        "clips": config.optim.clips_per_slot,
        "frames": config.clip.num_frames,
        "objects": config.tracking.num_objects,
        "locals": config.crops.num_locals,
        "precision": config.optim.precision if device.type == "cuda" else "float32",
    }


def _exact(figures: Figures, config: Config, device: torch.device) -> dict[str, Any]:
    """Measure the plain form and the baseline of all others: its products and its parts."""
    timed = Timed(config, device)
    step = functools.partial(timed.step, config, slot_forward)
    products = record(step)
    found = _times(step, config, device)
    figures.put("exact", found)
    figures.put("parts", timed.parts(config)["parts"])
    figures.put("rates", _rates(products, found["seconds"], device))
    figures.attempt("timm", lambda: _timm(config, device))
    return found


def _form(config: Config, device: torch.device, forward: SlotForward | None, *, number: int = 0) -> dict[str, Any]:
    """Measure one form of the step; without a forward, ours with masks that keep KEEP_SHARE of the patches."""
    _free(device)
    timed = Timed(config, device)
    if forward is None:
        forward = functools.partial(slot_forward, masks=timed.masks())
    return _times(functools.partial(timed.step, config, forward, number=number), config, device)


def _fp8(paper: Config, device: torch.device) -> dict[str, Any]:
    """Measure the form with an fp8 teacher; older versions of torch have fp8 products on GPUs only."""
    try:
        return _form(load_config(paper, "optim.teacher_precision=fp8"), device, slot_forward)
    except NotImplementedError as error:
        if device.type == "cuda":
            raise
        return {"skipped": f"torch {torch.__version__} has no fp8 products on a CPU: {type(error).__name__}"}


def _larger(config: Config, device: torch.device) -> dict[str, Any]:
    """Measure a larger network and its share of the rates."""
    _free(device)
    timed = Timed(config, device)
    step = functools.partial(timed.step, config, slot_forward)
    products = record(step)
    found = _times(step, config, device)
    return found | _rates(products, found["seconds"], device)


def _times(step: Callable[[], float], config: Config, device: torch.device) -> dict[str, Any]:
    """Return seconds and memory of a step; the first call compiles, selects kernels and allocates memory."""
    first = step()
    if config.optim.cuda_graph:
        # The call after these records the graph, which belongs to the peak.
        for _ in range(WARM_UP_CALLS - 1):
            step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, began = [step() for _ in range(2)], time.perf_counter()
    while len(seconds) < MOST_STEPS and (len(seconds) < 3 or time.perf_counter() - began < MOST_SECONDS):
        seconds.append(step())
    middle = statistics.median(seconds)
    found = {
        "seconds": middle,
        "noise": noise(seconds),
        "steps": len(seconds),
        "first_seconds": first,
        "clips_per_second": config.optim.clips_per_slot / middle,
    }
    if device.type == "cuda":
        found["peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


def _rates(products: Products, seconds: float, device: torch.device) -> dict[str, Any]:
    """Return the step's rate, and its share of the rates of its own products alone and of a large square product."""
    by_type, size = products.by_type(), 8192 if device.type == "cuda" else 512
    squares = {kind: square_flops_per_second(size, kind, device) for kind in by_type}
    alone = sum(some.seconds(device) for some in by_type.values())
    as_square = sum(some.flops / squares[kind] for kind, some in by_type.items())
    return {
        "tflop": products.flops / 1e12,
        "tflop_per_second": products.flops / seconds / 1e12,
        "share_of_own_shapes": alone / seconds,
        "share_of_square": as_square / seconds,
        "square_tflop_per_second": {str(kind).removeprefix("torch."): rate / 1e12 for kind, rate in squares.items()},
    }


def _timm(config: Config, device: torch.device) -> dict[str, Any]:
    """Return timm's plain ViT's share of its own products' rate, forward and backward."""
    _free(device)
    plain = Yardstick(config, device, half=device.type == "cuda")
    plain.matmul_share()
    return {"share_of_own_shapes": statistics.median(plain.matmul_share() for _ in range(3))}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
