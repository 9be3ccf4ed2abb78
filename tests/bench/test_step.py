"""Step benchmark on a network so small that it takes a second: the reported figures exist and are consistent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dora_ray.bench import step
from dora_ray.bench.noise import TOO_NOISY, noise, noisy_paths, refuse
from dora_ray.bench.products import record
from dora_ray.bench.saving import Written, cost
from dora_ray.bench.timed import ALONE, KEEP_SHARE, Timed
from dora_ray.config import load_config
from dora_ray.errors import ConfigError
from dora_ray.method.dora import slot_forward
from dora_ray.method.losses import log_sums
from dora_ray.method.parts import part, watched
from dora_ray.training.memory import estimate_memory_mb

SMALL = (
    "model.width=48",
    "model.depth=2",
    "model.num_heads=3",
    "clip.num_frames=2",
    "crops.clip_size=40",
    "crops.global_size=32",
    "crops.local_size=16",
    "head.hidden_width=16",
    "head.bottleneck_width=8",
    "head.num_outputs=32",
    "optim.clips_per_slot=1",
)
OF_FORWARD_AND_BACKWARD = {"teacher", "tracker", "student_forward", "loss", "measures", "backward"}
PARTS = {"upload", "augment", "optimizer", "ema"} | OF_FORWARD_AND_BACKWARD


def test_reports_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs on this machine make times uneven; another test covers that."""
    monkeypatch.setattr(step, "noisy_paths", lambda seconds: set())
    config, told = load_config("paper", *SMALL), []
    result = step.run(quick=True, config=config, report=lambda *progress: told.append(progress))
    ours = result["seconds_per_step"]
    assert result["speedup"] == pytest.approx(result["reference_seconds_per_step"] / ours)
    assert result["packed_speedup"] == pytest.approx(ours / result["packed_seconds_per_step"])
    every_second = result["every_second_seconds_per_step"]
    assert result["every_second_speedup"] == pytest.approx(ours / every_second)
    assert every_second > ours / 2
    assert set(result["parts"]) == PARTS | {"reduction_exact", "reduction_float32"}
    assert all(seconds > 0 for seconds in result["parts"].values())
    assert 0 < result["augment_share"] < 1
    assert result["tflop_per_step"] > 0
    assert result["matmul_share"] == TOO_NOISY or 0 < result["matmul_share"] <= 1
    assert 0 < result["peak_memory_mb"] <= result["reference_peak_memory_mb"]
    sizes = estimate_memory_mb(config, half=torch.cuda.is_available())
    assert result["estimated_memory_mb"] == pytest.approx(sizes["total"] - sizes["snapshot"])
    assert result["all_reduce_exact_seconds"] > 0
    assert result["all_reduce_float32_seconds"] > 0
    slower = result["checkpoint_slowdown_seconds"]
    if slower != TOO_NOISY:
        assert result["checkpoint_share"] == pytest.approx((result["checkpoint_held_seconds"] + slower) / 30)
    assert result["checkpoint_write_seconds"] > 0
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert len({total for _, total, _ in told}) == 1
    assert len(told) == told[0][1]
    assert {"ours", "packed", "every_second", "reference"} < {name for _, _, name in told}


def test_a_busy_machine_is_reported_instead_of_meaningless_figures() -> None:
    seconds = {"ours": [1.0, 1.1, 1.05], "packed": [0.5, 0.9, 0.9], "reference": [2.0, 2.0]}
    assert noise(seconds["packed"]) == pytest.approx(0.8)
    assert noisy_paths(seconds) == {"packed"}
    result = {
        "seconds_per_step": 1.05,
        "speedup": 1.9,
        "packed_speedup": 1.17,
        "matmul_share": 1.176,
        "timm_matmul_share": 0.7,
        "packed_keep_share": 0.4,
        "checkpoint_share": -0.18,
        "checkpoint_slowdown_seconds": -5.4,
    }
    told = step._without_noise(result, seconds)
    assert told.pop("note").startswith(
        "too noisy to compare: packed_speedup, matmul_share, checkpoint_share, checkpoint_slowdown_seconds."
    )
    refused = ("packed_speedup", "matmul_share", "checkpoint_share", "checkpoint_slowdown_seconds")
    assert told == result | dict.fromkeys(refused, TOO_NOISY)
    nothing = refuse(result, {"ours"})
    assert {name for name, value in nothing.items() if value != TOO_NOISY} == {"seconds_per_step", "packed_keep_share"}
    of_products = refuse(result | {"checkpoint_share": 0.1}, {"products_float32"})
    assert (of_products["timm_matmul_share"], of_products["checkpoint_share"]) == (TOO_NOISY, 0.1)
    assert step._without_noise({"speedup": 1.9}, seconds) == {"speedup": 1.9}


def test_the_baseline_has_no_options() -> None:
    baseline = load_config("paper", *SMALL, *ALONE, "tracking.kind=none")
    seconds, device = {"ours": [4.0], "reference": [8.0]}, torch.device("cpu")
    assert step._options(baseline, device) == {}
    assert "tracker" not in Timed(baseline, device).parts(baseline)["parts"]
    assert not any(name.startswith(("packed", "every")) for name in step._speeds(baseline, device, seconds))


def test_the_share_of_a_compiled_step_is_told_beside_that_of_ours() -> None:
    config, device = load_config("paper", *SMALL, *ALONE), torch.device("cpu")
    products = record(lambda: torch.ones(8, 8) @ torch.ones(8, 8))
    seconds = {"ours": [4.0], "compiled": [2.0], "products_float32": [1.0], "timm_matmul_share": [0.5]}
    found = step._shares(products, seconds, device)
    assert (found["matmul_share"], found["compiled_matmul_share"]) == (0.25, 0.5)
    assert step._speeds(config, device, seconds | {"reference": [8.0]})["compiled_speedup"] == 2


def test_an_option_that_cannot_run_is_named_and_what_must_run_is_not_hidden() -> None:
    def fail() -> float:
        raise AssertionError("no kernel image\nfor this device")

    paths = {"ours": lambda: 1.0, "packed": fail}
    assert step._call_first(paths, list(paths), {"packed"}) == {"packed_failed": "AssertionError: no kernel image"}
    assert set(paths) == {"ours"}
    with pytest.raises(AssertionError, match="no kernel"):
        step._call_first({"ours": fail}, ["ours"], {"packed"})


def test_a_gpu_is_used_whatever_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert step._setting(load_config("paper", *SMALL))[1].type == "cuda"
    config, device = step._setting(None, "cpu")
    assert (config.model.name, device.type) == ("vit_tiny_patch16_224", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU"):
        step.run(quick=True, device_name="cuda")


def test_options_where_they_can_be_set_and_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    chips = {"cuda"}
    monkeypatch.setattr(step, "has_fp8", lambda device: device.type in chips)

    def names(device: str, *overrides: str) -> set[str]:
        return set(step._options(load_config("paper", *SMALL, *ALONE, *overrides), torch.device(device)))

    assert names("cpu") == {"packed", "every_second"}
    assert names("cuda") == {"packed", "every_second", "fp8_teacher", "compiled"}
    chips.clear()
    assert names("cuda", "optim.precision=float32") == {"packed", "every_second", "bf16_teacher", "compiled"}
    assert names("cpu", "crops.num_locals=0", "tracking.threshold=soft") == set()
    assert names("cpu", "loss.reduction=released") == {"packed"}


def test_every_second_step_has_no_objects() -> None:
    timed = Timed(load_config("paper", *SMALL, *ALONE), torch.device("cpu"))
    option = step._options(timed.config, timed.device)["every_second"]

    def parts(number: int) -> set[str]:
        found = set()

        @contextmanager
        def watch(name: str) -> Iterator[None]:
            found.add(name)
            yield

        with watched(watch):
            timed.step(option, slot_forward, number=number)
        return found

    assert parts(0) - parts(1) == {"tracker"}


def test_cost_of_a_checkpoint() -> None:
    """Blocked for 0.5 s, and two steps of 2 s that took 3 s and 2.2 s."""
    found = cost([Written(held=0.5, steps=[3.0, 2.2], seconds=4.0)], [2.0])
    assert found["checkpoint_slowdown_seconds"] == pytest.approx(1.2)
    assert found["checkpoint_share"] == pytest.approx(1.7 / 30)


def test_masks_keep_the_stated_share_each_its_own() -> None:
    timed = Timed(load_config("paper", *SMALL, "crops.global_size=224", *ALONE), torch.device("cpu"))
    masks = timed.masks()
    assert masks.shape == (1, 3, 2, 14 * 14)
    assert float(masks.mean()) == pytest.approx(KEEP_SHARE, abs=0.01)
    assert len(masks.sum(dim=-1).unique()) > 3


def test_every_product_of_a_step_is_counted() -> None:
    """Count forward and backward of a linear layer and of attention by hand."""
    layer, tokens = torch.nn.Linear(4, 6), torch.randn(5, 4, requires_grad=True)
    assert record(lambda: layer(tokens).sum().backward()).flops == 3 * 2 * 5 * 4 * 6
    students, rows = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    # Outputs, again in the backward, and the gradients of both factors.
    assert record(lambda: log_sums(students, rows, temperature=0.1).sum().backward()).flops == 4 * 2 * 5 * 4 * 6
    query, key, value = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

    assert record(attend).flops == 2 * 3 * (2 + 4) * 2 * 7 * 7 * 8


def test_products_that_resample_views_are_not_counted() -> None:
    left, right = torch.randn(4, 5), torch.randn(5, 6)

    def work() -> None:
        for name in ("augment", "loss"):
            with part(name):
                left @ right
        left.double() @ right.double()

    products = record(work)
    assert products.flops == 2 * 2 * 4 * 5 * 6
    assert {kind: some.flops for kind, some in products.by_type().items()} == {
        torch.float32: 2 * 4 * 5 * 6,
        torch.float64: 2 * 4 * 5 * 6,
    }


def test_needs_neither_ray_nor_a_decoder() -> None:
    """The benchmark needs only torch, timm, and the reader of configurations."""
    absent = ["ray", "av", "decord", "lance", "pyarrow", "simplejpeg", "rich", "plotly", "tensorboardX"]
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        f"{absent!r})); import dora_ray.bench.step, dora_ray.training.step, dora_ray.method.reference"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
