"""The estimate of a worker's memory beside what a step takes, and the allocator's setting."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest

from dora_ray.config import load_config
from dora_ray.training.memory import estimate_memory_mb

SMALL = (
    "model.name=vit_tiny_patch16_224",
    "model.depth=8",
    "clip.num_frames=8",
    "optim.clips_per_slot=1",
    "head.num_outputs=4096",
)
# What one process takes at its height above what it took before; the peak is reset after a step of almost no size.
MEASURE = """
import ctypes, gc, sys, torch
torch.set_num_threads(1)
from dora_ray.bench import step
from dora_ray.config import load_config

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def forward(*networks, **slot):
    with torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[1] == "half"):
        return step.slot_forward(*networks, **slot)

def work(config):
    timed = step._Timed(load_config(config, *step.ALONE), torch.device("cpu"))
    timed.step(timed.config, forward)

config = load_config("paper", *sys.argv[2:])
work(load_config(config, "clip.num_frames=2", "crops.global_size=32", "crops.num_locals=0", "model.depth=2"))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
work(config)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resets the peak through /proc")
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("precision", ["whole", "half"])
def test_the_estimate_is_near_what_a_step_takes(checkpointing: str, precision: str) -> None:
    overrides = [*SMALL, f"optim.activation_checkpointing={checkpointing}"]
    command = [sys.executable, "-c", MEASURE, precision, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sizes = estimate_memory_mb(load_config("paper", *overrides), half=precision == "half")
    estimate = sizes["total"] - sizes["snapshot"]  # a step alone makes no checkpoint
    assert estimate == pytest.approx(float(done.stdout), rel=0.2)


def test_large_recipes_fit_a_gpu_of_80_gb() -> None:
    for recipe in ("paper", "paper-vit-b", "paper-vit-l"):
        assert estimate_memory_mb(load_config(recipe), half=True)["total"] < 60_000
    whole = load_config("paper-vit-l", "optim.activation_checkpointing=false")
    assert estimate_memory_mb(whole, half=True)["total"] > 80_000


@pytest.mark.parametrize(
    ("recipe", "checkpointing", "stated_gib"),
    [
        ("paper-vit-b", "false", 32),
        ("paper-vit-b", "true", 14),
        ("paper-vit-l", "true", 32),
        ("paper-vit-l", "false", 84),
    ],
)
def test_the_recipes_state_what_is_estimated(recipe: str, checkpointing: str, stated_gib: int) -> None:
    config = load_config(recipe, f"optim.activation_checkpointing={checkpointing}")
    assert round(estimate_memory_mb(config, half=True)["total"] / 1024) == stated_gib
    assert f"{stated_gib} GiB" in (resources.files("dora_ray") / "recipes" / f"{recipe}.yaml").read_text()


def test_total_is_the_sum_and_what_is_left_out_costs_nothing() -> None:
    sizes = estimate_memory_mb(load_config("paper", *SMALL), half=False)
    assert sizes["total"] == pytest.approx(sum(value for name, value in sizes.items() if name != "total"))
    bare = estimate_memory_mb(load_config("paper", *SMALL, "tracking.num_objects=1"), half=False)
    assert bare["activations"] < sizes["activations"]
