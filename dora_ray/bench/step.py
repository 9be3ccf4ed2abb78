"""The training step: our batched forward and backward beside the naive loop, on the same random views.

Works without Ray. The naive loop is `method.reference`: a forward for each frame and each object, all attention
matrices kept.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_ray.method.dora import Network, SlotOutput, build_network, slot_forward
from dora_ray.method.reference import reference_slot_forward

SlotForward = Callable[..., SlotOutput]

# ViT-Ti/16 with 8 frames on a CPU; ViT-S/16 with the full head on a GPU.
CPU_SETTING = {"width": 192, "num_heads": 3, "num_outputs": 4096, "num_clips": 2, "local_size": 112}
GPU_SETTING = {"width": 384, "num_heads": 6, "num_outputs": 65536, "num_clips": 16, "local_size": 96}
NUM_FRAMES, NUM_OBJECTS, NUM_LOCALS, GLOBAL_SIZE = 8, 3, 6, 224


def run(*, quick: bool) -> dict[str, Any]:
    """Seconds of a step, ours and the reference's, median over rounds in which they take turns.

    Args:
        quick: two rounds instead of five.

    Returns:
        seconds_per_step, reference_seconds_per_step, ratio (ours / reference), matmul_share (of the float rate of a
        large matrix product in the same run), peak_memory_mb, and the setting.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = GPU_SETTING if device.type == "cuda" else CPU_SETTING
    student, arguments = _make(setting, device)
    paths: dict[str, SlotForward] = {"ours": slot_forward, "reference": reference_slot_forward}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for forward in paths.values():
        _step(forward, student, arguments, device)
    for _ in range(2 if quick else 5):
        for name, forward in paths.items():
            seconds[name].append(_step(forward, student, arguments, device))
    ours, reference = (statistics.median(seconds[name]) for name in ("ours", "reference"))
    flops = _step_flops(student, arguments)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        **setting,
        "num_frames": NUM_FRAMES,
        "num_objects": NUM_OBJECTS,
        "num_locals": NUM_LOCALS,
        "rounds": len(seconds["ours"]),
        "seconds_per_step": ours,
        "reference_seconds_per_step": reference,
        "ratio": ours / reference,
        "tflop_per_step": flops / 1e12,
        "matmul_share": flops / ours / _matmul_rate(device),
        "peak_memory_mb": _peak_memory_mb(device),
    }


def _make(setting: dict[str, int], device: torch.device) -> tuple[Network, dict[str, Any]]:
    torch.manual_seed(0)
    networks = [
        build_network(
            name="vit_small_patch16_224",
            width=setting["width"],
            depth=12,
            num_heads=setting["num_heads"],
            patch_size=16,
            image_size=GLOBAL_SIZE,
            drop_path=0.0,
            num_layers=3,
            hidden_width=2048,
            bottleneck_width=256,
            num_outputs=setting["num_outputs"],
        ).to(device)
        for _ in range(2)
    ]
    student, teacher = networks[0].train(), networks[1].eval().requires_grad_(False)
    clips, local = setting["num_clips"], setting["local_size"]
    arguments = {
        "teacher": teacher,
        "center": torch.zeros(setting["num_outputs"], device=device),
        "globals_": torch.randn(clips, 1, NUM_FRAMES, 3, GLOBAL_SIZE, GLOBAL_SIZE, device=device),
        "locals_": torch.randn(clips, NUM_LOCALS, NUM_FRAMES, 3, local, local, device=device),
        "heads": torch.stack([torch.randperm(setting["num_heads"])[:NUM_OBJECTS] for _ in range(clips)]).to(device),
        "noise": None,
        "kind": "dora",
        "block": -2,
        "normalize_patches": True,
        "num_iterations": 30,
        "epsilon": 0.05,
        "threshold": "clip",
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "reduction": "mean",
    }
    return student, arguments


def _step(forward: SlotForward, student: Network, arguments: dict[str, Any], device: torch.device) -> float:
    """Seconds of one forward and backward."""
    _synchronize(device)
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = forward(student, **arguments).loss
    loss.backward()
    _synchronize(device)
    student.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step_flops(student: Network, arguments: dict[str, Any]) -> float:
    """Operations of a step's encoders and heads: 2 a weight and token, and attention; backward is twice forward."""
    width = student.backbone.embed_dim
    depth = len(student.backbone.blocks)
    block_weights = sum(p.numel() for p in student.backbone.blocks.parameters() if p.ndim == 2)
    head_weights = sum(p.numel() for p in student.head.parameters() if p.ndim == 2)

    def forward_flops(images: Tensor) -> float:
        tokens = (images.shape[-1] // 16) ** 2 + 1
        frames = images.shape[:3].numel()
        embed = 2 * 3 * 16 * 16 * width * tokens
        return frames * (2 * tokens * block_weights + depth * 4 * tokens**2 * width + embed + 2 * head_weights)

    whole, local = forward_flops(arguments["globals_"]), forward_flops(arguments["locals_"])
    return whole + 3 * (NUM_OBJECTS * whole + local)


def _matmul_rate(device: torch.device) -> float:
    """Operations a second of a large square product, in the step's own number format."""
    size = 8192 if device.type == "cuda" else 1536
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    left @ right
    rates = []
    for _ in range(5):
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return max(rates)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
