"""Training step (views, forward, backward, exact sum and update) compared with the same step with a naive forward.

Runs without Ray. The naive forward is `method.reference`: one pass for each frame and each view, all attention matrices
kept, the loss one pair of outputs at a time. The rest of the step is identical.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from dora_ray.bench.noise import TOO_NOISY, noise, noisy_paths, refuse
from dora_ray.bench.products import Products, record, square_flops_per_second
from dora_ray.bench.ranks import all_reduce_seconds
from dora_ray.bench.saving import Saving, cost
from dora_ray.bench.timed import ALONE, KEEP_SHARE, Timed
from dora_ray.bench.yardstick import Yardstick
from dora_ray.config import Config, load_config
from dora_ray.errors import ConfigError
from dora_ray.method.dora import slot_forward
from dora_ray.method.reference import reference_slot_forward
from dora_ray.training.graph import WARM_UP_CALLS
from dora_ray.training.memory import estimate_memory_mb
from dora_ray.training.numerics import has_fp8, prepare_torch

# A ViT-Ti/16 with a small head on a CPU; the unchanged recipe `paper` on a GPU.
ON_CPU = ("model.name=vit_tiny_patch16_224", "head.num_outputs=4096", "optim.clips_per_slot=2")

# Called before each measurement with the number done, the total, and the next one's name.
Report = Callable[[int, int, str], None]


def run(
    *, quick: bool, config: Config | None = None, device_name: str | None = None, report: Report | None = None
) -> dict[str, Any]:
    """Measure the seconds of a step: ours, with options that save arithmetic, and the reference; medians over rounds.

    The paths take turns within a round. A GPU is used if there is one, whatever the recipe says about the cluster.

    Args:
        quick: two rounds with one checkpoint, instead of five of each.
        config: configuration to train; default: the recipe `paper` on a GPU, ViT-Ti/16 with 4096 outputs and 2 clips on
            a CPU.
        device_name: "cpu" or "cuda", to force the device.
        report: callback for progress.

    Returns:
        seconds_per_step, reference_seconds_per_step, and noise: by how much the median round of ours exceeds the
        fastest, as a share.

        Every comparison is a speed-up, above 1 if something is gained. speedup: the reference's seconds over ours. For
        the options, ours over theirs: packed_speedup, at a keep share of 0.4; every_second_speedup, with the mean of a
        step with objects and one without; bf16_teacher_speedup, on a GPU that computes in float32; fp8_teacher_speedup,
        on a GPU with fp8; compiled_speedup, on a GPU.

        tflop_per_step and matmul_share: time of the networks' and the tracker's products alone, run back to back, over
        the time of the step in the same round; with several number types also per type (on a GPU, float32 beside bf16
        is TF32).
        square_matmul_share: time that they would take at the rate of a large square product of their type.
        timm_matmul_share: matmul_share of timm's own ViT, see `yardstick`; compiled_matmul_share: of our compiled step,
        on a GPU.

        Checkpoint figures, see `saving.cost`; all_reduce_exact_seconds and all_reduce_float32_seconds, see
        `ranks.all_reduce_seconds`.

        NAME_failed with the reason, in place of the figures of an option that this GPU or torch cannot run.

        Seconds of the step's parts, their augment_share (without the clips' upload), peak memory, clips per second, and
        the setting.

        If the machine was too busy to compare, "too noisy" in place of a number, and a note; see `noise.refuse`.

    Raises:
        ConfigError: "cuda" without a GPU.
    """
    config, device = _setting(config, device_name)
    prepare_torch(device, config.optim, deterministic=config.run.deterministic)
    timed = Timed(config, device)
    ours = functools.partial(timed.step, config, slot_forward)
    # The first of our steps records the products.
    products = record(ours)
    reference = functools.partial(timed.step, config, reference_slot_forward)
    # Peak memory on a GPU must be measured with each path alone.
    peak = timed.peaks({"ours": ours, "reference": reference}) if device.type == "cuda" else {}
    paths: dict[str, Callable[[], float]] = {"ours": ours}
    options = _options(config, device)
    for name, option in options.items():
        forward = functools.partial(slot_forward, masks=timed.masks()) if name == "packed" else slot_forward
        # These options change the networks themselves.
        of = Timed(option, device) if name in ("fp8_teacher", "compiled") else timed
        # With every_second, step 0 equals ours; step 1, without objects, is timed.
        paths[name] = functools.partial(of.step, option, forward, number=int(name == "every_second"))
    for kind, some in products.by_type().items():
        paths[f"products_{_name(kind)}"] = functools.partial(some.seconds, device)
    plain = Yardstick(config, device, half=_precision(config, device) != torch.float32)
    paths["timm_matmul_share"] = plain.matmul_share
    # Run the reference, which takes more memory, after all other peaks are recorded: a CPU process's peak never falls.
    paths["reference"] = reference
    # The first call compiles; on a GPU it also selects kernels and allocates memory, and a later one records the graph.
    first = (1 + WARM_UP_CALLS) * list(paths) if device.type == "cuda" else ["ours"] if config.optim.compile else []
    num_rounds = 2 if quick else 5
    announced = _announced(paths, report, total=len(first) + num_rounds * len(paths))
    failed = _call_first(announced, first, options)
    with tempfile.TemporaryDirectory() as folder:
        saving = Saving(ours, timed.state, config, folder)
        announced |= _announced({"saving": saving.seconds}, None, total=0)
        counts = dict.fromkeys(announced, num_rounds)
        seconds, of_process = timed.rounds(announced, counts | ({"saving": 1} if quick else {}))
    # The reference's first step allocates memory that ours did not need.
    seconds["reference"] = seconds["reference"][1:]
    checkpoints = cost(saving.written, seconds["ours"][: len(saving.written)])
    result = (
        _speeds(config, device, seconds)
        | _memory(config, device, of_process | peak)
        | _shares(products, seconds, device)
    )
    result |= checkpoints | timed.parts(config)
    sums = {f"all_reduce_{kind}_seconds": found for kind, found in all_reduce_seconds(timed.sizes).items()}
    return _without_noise(result, seconds) | sums | failed


def _announced(
    paths: dict[str, Callable[[], float]], report: Report | None, *, total: int
) -> dict[str, Callable[[], float]]:
    """Wrap paths so that each announces its start."""
    numbers = itertools.count()

    def tell(name: str, path: Callable[[], float]) -> float:
        if report is not None:
            report(next(numbers), total, name)
        return path()

    return {name: functools.partial(tell, name, path) for name, path in paths.items()}


def _without_noise(result: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Remove comparisons that were too noisy, and add a note."""
    quiet = refuse(result, noisy_paths(seconds))
    refused = [name for name, value in quiet.items() if value == TOO_NOISY]
    if not refused:
        return quiet
    return quiet | {
        "note": f"too noisy to compare: {', '.join(refused)}. The median round of ours took "
        f"{noise(seconds['ours']):.0%} more than the fastest: other programs ran meanwhile. Run it again on an idle "
        "machine."
    }


def _call_first(
    paths: dict[str, Callable[[], float]], names: Iterable[str], options: Collection[str]
) -> dict[str, str]:
    """Call the named paths, some of them repeatedly; drop options that raise, and return their errors."""
    failed = {}
    for name in names:
        if name not in paths:
            continue
        try:
            paths[name]()
        except Exception as error:  # torch.compile raises many kinds
            if name not in options:
                raise
            del paths[name]
            said = str(error).partition("\n")[0]
            failed[f"{name}_failed"] = f"{type(error).__name__}: {said}"
    return failed


def _setting(config: Config | None, device_name: str | None = None) -> tuple[Config, torch.device]:
    """Return the configuration, with one slot a step, and the device."""
    if device_name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device=cuda, but torch finds no GPU here: leave it out, or check nvidia-smi")
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if config is None:
        config = load_config("paper", *(() if device.type == "cuda" else ON_CPU))
    return load_config(config, *ALONE), device


def _options(config: Config, device: torch.device) -> dict[str, Config]:
    """Return the configuration with each applicable option that saves arithmetic."""
    objects = config.tracking.kind != "none"
    found: dict[str, tuple[str, ...]] = {}
    if objects and config.tracking.threshold != "soft":
        found["packed"] = ("tracking.views=packed",)
    if objects and config.crops.num_locals and config.loss.reduction == "mean":
        found["every_second"] = ("tracking.every_steps=2",)
    if device.type == "cuda" and config.optim.precision == "float32":
        found["bf16_teacher"] = ("optim.teacher_precision=bf16",)
    if has_fp8(device):
        found["fp8_teacher"] = ("optim.teacher_precision=fp8",)
    if device.type == "cuda" and not config.optim.compile:
        found["compiled"] = ("optim.compile=true",)
    return {name: load_config(config, *words) for name, words in found.items()}


def _speeds(config: Config, device: torch.device, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the setting, step times, and ratios."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ours = median["ours"]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "network": f"{config.model.name}, {config.head.num_outputs} outputs, {_name(_precision(config, device))}",
        "slot": f"{config.optim.clips_per_slot} clips of {config.clip.num_frames} frames, "
        f"{config.tracking.num_objects} objects, {config.crops.num_locals} local views; "
        f"{config.crops.global_size} and {config.crops.local_size} px",
        "seconds_per_step": ours,
        "reference_seconds_per_step": median["reference"],
        "speedup": median["reference"] / ours,
        "noise": noise(seconds["ours"]),
        "clips_per_second": config.optim.clips_per_slot / ours,
    }
    if "packed" in median:
        result |= {
            "packed_seconds_per_step": median["packed"],
            "packed_speedup": ours / median["packed"],
            "packed_keep_share": KEEP_SHARE,
        }
    if "every_second" in median:
        mean = (ours + median["every_second"]) / 2
        result |= {"every_second_seconds_per_step": mean, "every_second_speedup": ours / mean}
    for name in {"bf16_teacher", "fp8_teacher", "compiled"} & median.keys():
        result[f"{name}_speedup"] = ours / median[name]
    return result


def _shares(products: Products, seconds: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Return the operations of the matrix products, and their share of a step."""
    ours, by_type = seconds["ours"], products.by_type()
    size = 8192 if device.type == "cuda" else 1536
    rates = {_name(kind): square_flops_per_second(size, kind, device) for kind in by_type}
    alone = [sum(parts) for parts in zip(*(seconds[f"products_{name}"] for name in rates), strict=True)]
    square = sum(some.flops / rates[_name(kind)] for kind, some in by_type.items())
    result = {
        "tflop_per_step": products.flops / 1e12,
        "tflop_per_second": products.flops / 1e12 / statistics.median(ours),
        "matmul_share": _median_share(alone, ours),
        "timm_matmul_share": statistics.median(seconds["timm_matmul_share"]),
        "square_matmul_share": square / statistics.median(ours),
    }
    if "compiled" in seconds:
        result["compiled_matmul_share"] = _median_share(alone, seconds["compiled"])
    if len(rates) > 1:
        result |= {f"matmul_share_{name}": _median_share(seconds[f"products_{name}"], ours) for name in rates}
    return result | {f"square_matmul_tflop_per_second_{name}": rate / 1e12 for name, rate in rates.items()}


def _median_share(alone: list[float], steps: list[float]) -> float:
    """Return the median over rounds of the products' time alone, divided by the step's."""
    return statistics.median(one / step for one, step in zip(alone, steps, strict=True))


def _memory(config: Config, device: torch.device, peak: dict[str, float]) -> dict[str, float]:
    """Return measured and estimated megabytes; the snapshot, which is not part of a step, is excluded."""
    sizes = estimate_memory_mb(config, half=_precision(config, device) == torch.bfloat16)
    return {
        "peak_memory_mb": peak["ours"],
        "reference_peak_memory_mb": peak["reference"],
        "estimated_memory_mb": sizes["total"] - sizes["snapshot"],
    }


def _precision(config: Config, device: torch.device) -> torch.dtype:
    half = device.type == "cuda" and config.optim.precision == "bf16"
    return torch.bfloat16 if half else torch.float32


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
